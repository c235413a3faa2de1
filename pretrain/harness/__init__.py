"""A run under lm-evaluation-harness: its model, and our files of items as its tasks."""
