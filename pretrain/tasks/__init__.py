"""Evaluation on tasks: files of items, what the model makes of them at each depth, and scores."""
