"""What the record of a step says beside its loss: depths, speed, where time went, sources.

Everything about depths and rows follows from the step's number, so no rank asks another for it.
"""

from bisect import bisect_left
from collections.abc import Sequence

from pretrain.config import TrainConfig
from pretrain.data.order import Order
from pretrain.model.cost import TokenFlops
from pretrain.model.depth import WITH_GRAD_COST, Depth

HISTOGRAM_EDGES = (0, 1, 2, 4, 8, 16, 24, 32, 40, 48, 64, 96, 128, 1 << 20)
"""Bin i of depth/histogram has the rows with edge i < depth <= edge i + 1."""


def work(depths: Sequence[Depth]) -> float:
    """Forward passes of the core, a backward pass being three."""
    return float(sum(depth.no_grad + WITH_GRAD_COST * depth.with_grad for depth in depths))


def depth_metrics(depths: Sequence[Depth], *, ranks: int) -> dict[str, float | list[int]]:
    """Of all rows of a step: depth/mean, min, max, histogram; and depth/balance.

    depth/balance is the core's work of the rank that has most of it over the mean of the ranks.
    """
    totals = [depth.total for depth in depths]
    counts = [0] * (len(HISTOGRAM_EDGES) - 1)
    for total in totals:
        counts[bisect_left(HISTOGRAM_EDGES, total) - 1] += 1
    rows = len(depths) // ranks
    by_rank = [work(depths[rank * rows : (rank + 1) * rows]) for rank in range(ranks)]
    return {
        "depth/mean": sum(totals) / len(totals),
        "depth/min": min(totals),
        "depth/max": max(totals),
        "depth/histogram": counts,
        "depth/balance": max(by_rank) * ranks / sum(by_rank),
    }


def speed_metrics(
    config: TrainConfig, depths: Sequence[Depth], *, step_s: float, ranks: int, peak: float
) -> dict[str, float]:
    """Tokens and FLOPs a second of a step with these depths, and their share of `peak` FLOP/s.

    speed/mfu counts the mathematics alone, speed/hfu also what activation checkpoints run again.
    """
    tokens_per_s = config.batch.global_tokens / step_s
    kept, rows = config.engine.model_kept_iterations, len(depths)
    flops = TokenFlops.of(config.model)
    model = flops.model(
        no_grad=sum(depth.no_grad for depth in depths) / rows,
        with_grad=sum(depth.with_grad for depth in depths) / rows,
    )
    again = 0 if kept is None else sum(max(depth.with_grad - kept, 0) for depth in depths) / rows
    per_rank = tokens_per_s / ranks
    return {
        "speed/step_s": step_s,
        "speed/tokens_per_s": tokens_per_s,
        "speed/tokens_per_s_per_rank": per_rank,
        "speed/model_flops_per_s_per_rank": per_rank * model,
        "speed/mfu": per_rank * model / peak,
        "speed/hfu": per_rank * (model + flops.iteration * again) / peak,
        "speed/peak_flops": peak,
    }


def split_metrics(
    *, data_s: float, forward_s: float, backward_s: float, met_s: float, step_s: float
) -> dict[str, float]:
    """The seconds of a step; with data/wait_s they add up to it.

    Those of the ranks' own passes (data, forward, backward) are means over ranks. time/wait_s is
    what these leave of the time until the ranks have met (`met_s`): waiting for the slowest, and
    the meeting. Where ranks wait inside of passes, it is there: under ZeRO-2 and 3 in
    time/backward_s of each micro-step (3 in time/forward_s too), on CPUs with engine.overlap_comm
    in that of ZeRO-1's last one. On GPUs ZeRO-2 with engine.overlap_comm waits for its last sums in
    time/update_s.
    """
    own_s = data_s + forward_s + backward_s
    return {
        "data/wait_s": data_s,
        "time/forward_s": forward_s,
        "time/backward_s": backward_s,
        "time/wait_s": max(met_s - own_s, 0.0),
        "time/update_s": step_s - max(met_s, own_s),
    }


def source_metrics(order: Order, *, first_row: int, rows: int) -> dict[str, float]:
    """Of each source its share of a step's rows, and how often it has been read through by then.

    Rows that the run has gone past after a spike count as read.
    """
    before, after = order.mixture.counts(first_row), order.mixture.counts(first_row + rows)
    found = {}
    for source, share, epochs in zip(
        order.sources, ((after - before) / rows).tolist(), order.epochs(first_row + rows),
        strict=True,
    ):  # fmt: skip
        found[f"data/share_{source.name}"] = share
        found[f"data/epochs_{source.name}"] = epochs
    return found
