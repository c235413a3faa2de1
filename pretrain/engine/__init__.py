"""DeepSpeed, process groups and checkpoints."""
