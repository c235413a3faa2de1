"""What is looked at before a run: a machine, a node of a job, its nodes side by side, its ranks."""
