"""How long a run takes on a cluster: a model of its wall time, checked against measurement."""
