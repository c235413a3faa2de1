"""What `pretrain report` and `pretrain top` show of a run folder, without torch."""
