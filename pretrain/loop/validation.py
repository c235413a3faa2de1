"""Held-out loss at several depths, in one pass, the same whatever the number of ranks."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.config import TrainConfig
from pretrain.data.loader import Batch
from pretrain.engine.world import World
from pretrain.loop.micro_batches import labels_of
from pretrain.model.depth import Depth
from pretrain.model.diagnostics import Diagnostics
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
    diagnose_depth: int | None = None,
) -> dict[str, Any]:
    """Mean nats per token at each of `depths` over the ranks' slices of the held-out rows.

    Returns validation/depths, validation/loss_nats (both lists), validation/rows and
    validation/tokens. With `diagnose_depth` also the losses at 1 and there, whatever `depths` has,
    and there the `Diagnostics` of the state; validation/kl_nats, from each measured depth's
    prediction to that of the next one, which validation/kl_depths names; and state/moves, how far
    the state still moves in each iteration (||s_t - s_(t-1)|| / ||s_t||, t from 1). Every rank
    calls `forward` equally often, with idle rows if need be: under ZeRO-3 a forward pass is a
    collective.
    """
    extra = () if diagnose_depth is None else (1, diagnose_depth)
    measured = sorted({*depths, *extra})
    most = max(world.gather_objects(len(held_out.tokens_BS)))
    totals = torch.zeros((), dtype=torch.float64)
    num_labels = 0.0
    for start in range(0, most, config.batch.micro_rows):
        batch = _slice(held_out, start, config.batch.micro_rows)
        output = _forward(
            forward, config, world, batch or _idle_batch(config), measured, diagnose_depth
        )
        found = _sums(output)
        totals = totals + (torch.zeros_like(found) if batch is None else found)
        if batch is not None:
            num_labels += float((labels_of(batch, config.model.documents) != IGNORED).sum())
    *sums, count, all_rows = world.sum(
        [*totals.tolist(), num_labels, float(len(held_out.tokens_BS))]
    )
    losses = {depth: nats / max(count, 1.0) for depth, nats in zip(measured, sums, strict=False)}
    result = {
        "validation/depths": list(depths),
        "validation/loss_nats": [losses[depth] for depth in depths],
        "validation/rows": int(all_rows),
        "validation/tokens": int(count),
    }
    if diagnose_depth is not None:
        result["validation/loss_at_1_nats"] = losses[1]
        result["validation/loss_at_mean_nats"] = losses[diagnose_depth]
        kl, rest = sums[len(measured) :][: len(measured) - 1], sums[2 * len(measured) - 1 :]
        result["validation/kl_depths"] = measured[1:]
        result["validation/kl_nats"] = [nats / max(count, 1.0) for nats in kl]
        result |= _diagnostics(rest)
    return result


def _sums(output: Output) -> Tensor:
    """Sums over the rows of a micro-batch: nats at each depth; KL, diagnostics, moves if any."""
    assert output.nats_by_depth is not None
    parts = [output.nats_by_depth]
    if output.diagnostics is not None:
        assert output.kl_by_depth is not None
        assert output.moves is not None
        parts += [output.kl_by_depth, torch.stack(output.diagnostics), output.moves]
    return torch.cat([part.double().sum(-1) for part in parts]).cpu()


def _diagnostics(sums: Sequence[float]) -> dict[str, Any]:
    """Means over rows, from the sums of the diagnostics and of the moves behind them."""
    named = Diagnostics._fields
    rows = max(sums[len(named) - 1], 1.0)
    state, hidden, norm, residual = (total / rows for total in sums[: len(named) - 1])
    return {
        "state/token_correlation": state,
        "state/norm": norm,
        "state/relative_residual": residual,
        "hidden/token_correlation": hidden,
        "state/moves": [total / rows for total in sums[len(named) :]],
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
    diagnose_depth: int | None,
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
                sigma=model.state_sigma,
                device=world.device,
            ),
            labels=labels_of(batch, model.documents).to(world.device),
            documents=batch.documents_BS[:, :-1].to(world.device),
            evaluate_depths=list(depths),
            diagnose_depth=diagnose_depth,
        )


def _idle_batch(config: TrainConfig) -> Batch:
    padding = torch.zeros(1, config.model.context + 1, dtype=torch.int64)
    return Batch(first_row=0, tokens_BS=padding, documents_BS=padding - 1)
