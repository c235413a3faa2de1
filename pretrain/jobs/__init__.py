"""How a run becomes a job: code snapshot, script, queue, hosts. Torch-free."""
