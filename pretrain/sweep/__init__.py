"""Commands about the runs that one `pretrain submit --multirun` has submitted."""
