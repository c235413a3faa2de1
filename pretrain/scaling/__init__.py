"""How long a run takes on a cluster: a model of its wall time, and its check against measurement."""
