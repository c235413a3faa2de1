"""Which sources a run's rows came from, by its law of mixture: no shard is opened."""

from pretrain.data.mixture import Mixture, Phases
from pretrain.reporting.run import Run


def rows_by_source(run: Run) -> dict[str, int]:
    """Rows that each source gave to the steps that count, the largest first.

    Exact if the configuration names weights; empty if it leaves them to the sizes of the sources,
    which only the shards' manifest knows.
    """
    data = run.config.data
    weights = {name: source.weight for name, source in data.sources.items()}
    if not weights or any(weight is None for weight in weights.values()):
        return {}
    first = run.record.series.get("data/first_row")
    if not first:
        return {}
    phases = [(0, Mixture([weight or 0.0 for weight in weights.values()]))]
    for milestone in data.milestones:
        of_phase = Mixture([milestone.weights.get(name, 0.0) for name in weights])
        phases.append((milestone.first_row(data.context), of_phase))
    mixture = Phases(phases)
    counts = mixture.counts(int(first.values[-1]) + run.config.rows_per_step)
    for rewind in run.rewinds:
        counts = counts - mixture.counts(rewind.next_row) + mixture.counts(rewind.first_row)
    found = dict(zip(weights, counts.tolist(), strict=True))
    return dict(sorted(found.items(), key=lambda each: -each[1]))
