"""Held-out loss at several depths, in one pass, the same whatever the number of ranks."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pretrain.config import TrainConfig
from pretrain.data.loader import Batch
from pretrain.engine.world import World
from pretrain.loop.micro_batches import labels_of
from pretrain.model.depth import Depth
from pretrain.model.initial_state import initial_states
from pretrain.model.loss import IGNORED
from pretrain.model.recurrent import Output

# A training run draws its states from run.seed; held-out rows have a key of their own, so that
# every run and every number of rows measures against the same initial states.
STATE_SEED = 1_000_000_007


def validate(
    forward: Callable[..., Output],
    config: TrainConfig,
    world: World,
    held_out: Batch,
    *,
    depths: Sequence[int],
) -> dict[str, Any]:
    """Mean nats per token at each of `depths` over the ranks' slices of the held-out rows.

    Returns validation/depths, validation/loss_nats (both lists), validation/rows and
    validation/tokens. Every rank calls `forward` equally often, with idle rows if need be: under
    ZeRO-3 a forward pass is a collective.
    """
    micro_rows = config.batch.micro_rows
    most = max(world.gather_objects(len(held_out.tokens_BS)))
    totals = torch.zeros(len(depths), dtype=torch.float64)
    num_labels = 0.0
    for start in range(0, most, micro_rows):
        batch = _slice(held_out, start, micro_rows)
        if batch is None:
            _idle_forward(forward, config, world, depths)
            continue
        output = _forward(forward, config, world, batch, depths)
        assert output.nats_by_depth is not None
        totals += output.nats_by_depth.double().sum(-1).cpu()
        num_labels += float((labels_of(batch, config.model.documents) != IGNORED).sum())
    *nats, count, all_rows = world.sum(
        [*totals.tolist(), num_labels, float(len(held_out.tokens_BS))]
    )
    return {
        "validation/depths": list(depths),
        "validation/loss_nats": [value / max(count, 1.0) for value in nats],
        "validation/rows": int(all_rows),
        "validation/tokens": int(count),
    }


def _slice(batch: Batch, start: int, rows: int) -> Batch | None:
    if start >= len(batch.tokens_BS):
        return None
    return Batch(
        first_row=batch.first_row + start,
        tokens_BS=batch.tokens_BS[start : start + rows],
        documents_BS=batch.documents_BS[start : start + rows],
    )


def _forward(
    forward: Callable[..., Output],
    config: TrainConfig,
    world: World,
    batch: Batch,
    depths: Sequence[int],
) -> Output:
    model = config.model
    first = batch.first_row
    with torch.no_grad():
        return forward(
            batch.tokens_BS[:, :-1].to(world.device),
            [Depth(no_grad=max(depths), with_grad=0)] * len(batch.tokens_BS),
            initial_state=initial_states(
                list(range(first, first + len(batch.tokens_BS))),
                seed=STATE_SEED,
                context=model.context,
                width=model.width,
                device=world.device,
            ),
            labels=labels_of(batch, model.documents).to(world.device),
            documents=batch.documents_BS[:, :-1].to(world.device),
            evaluate_depths=list(depths),
        )


def _idle_forward(
    forward: Callable[..., Output],
    config: TrainConfig,
    world: World,
    depths: Sequence[int],
) -> None:
    padding = torch.zeros(1, config.model.context + 1, dtype=torch.int64)
    batch = Batch(first_row=0, tokens_BS=padding, documents_BS=padding - 1)
    _forward(forward, config, world, batch, depths)
