"""Which sources a run's rows came from, by its law of mixture or its record: no shard is opened."""

from pretrain.data.mixture import Mixture, Phases
from pretrain.loop.passed_over import windows
from pretrain.reporting.record import Series
from pretrain.reporting.run import Run
from pretrain.reporting.specs import EPOCHS, SHARE, Spec


def rows_by_source(run: Run) -> dict[str, int]:
    """Rows that each source gave to the steps that count, the largest first.

    By the law if the configuration names weights. If it leaves them to the sizes of the sources,
    which only the shards' manifest knows, by what each step has recorded.
    """
    data = run.config.data
    weights = {name: source.weight for name, source in data.sources.items()}
    first, rows = run.record.last("data/first_row"), run.record.last("data/rows")
    has_weights = bool(weights) and all(weight is not None for weight in weights.values())
    if first is None or rows is None or not has_weights:
        return _recorded(run)
    phases = [(0, Mixture([weight or 0.0 for weight in weights.values()]))]
    for milestone in data.milestones:
        of_phase = Mixture([milestone.weights.get(name, 0.0) for name in weights])
        phases.append((milestone.first_row(data.context), of_phase))
    mixture = Phases(phases)
    reached = int(first + rows)
    counts = mixture.counts(reached)
    for passed, behind in windows(run.rewinds, before=reached):
        counts = counts - mixture.counts(behind) + mixture.counts(passed)
    found = dict(zip(weights, counts.tolist(), strict=True))
    return dict(sorted(found.items(), key=lambda each: -each[1]))


def _recorded(run: Run) -> dict[str, int]:
    sizes = run.record.series.get("data/rows", Series())
    # a life may have changed the batch, so each step has its own number of rows
    rows = dict(zip(sizes.steps, sizes.values, strict=True))
    found = {
        key.removeprefix(SHARE): round(
            sum(
                share * rows.get(step, 0.0)
                for step, share in zip(series.steps, series.values, strict=True)
            )
        )
        for key, series in run.record.series.items()
        if key.startswith(SHARE)
    }
    return dict(sorted(found.items(), key=lambda each: -each[1]))


def epochs_spec(run: Run) -> Spec:
    """The chart of how often each source has been read through."""
    keys = sorted(key for key in run.record.series if key.startswith(EPOCHS))
    names = tuple(key.removeprefix(EPOCHS) for key in keys)
    return Spec("How often each source has been read", tuple(keys), names, note="epochs")
