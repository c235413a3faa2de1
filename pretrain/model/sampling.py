"""The next token out of its logits, by a draw that depends on (seed, row, position) alone."""

# B rows  V vocabulary

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.model.decoding import Decoding
from pretrain.model.keyed import make_key, stack_keys, uniforms


def choose(
    logits_BV: Tensor, options: Decoding, *, rows: Sequence[int], positions: Sequence[int]
) -> Tensor:
    """One token of each row [B]; `positions` are those that the tokens will have."""
    if options.temperature == 0.0:
        return logits_BV.argmax(-1)
    # On the CPU: a few numbers, and the same ones for every device.
    keys = [make_key("sample", options.seed, row) for row in rows]
    positions_B = torch.tensor(positions, dtype=torch.int32)
    draws_B = uniforms(stack_keys(keys, positions_B.device), positions_B)
    return sample(
        logits_BV,
        draws_B.to(logits_BV.device),
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
    )


def sample(
    logits_BV: Tensor,
    draws_B: Tensor,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """One token of each row [B], by inverting the distribution's CDF at uniform float64 draws."""
    scaled_BV = logits_BV.double() / temperature
    sorted_BV, ids_BV = scaled_BV.sort(stable=True, dim=-1, descending=True)
    probabilities_BV = sorted_BV.softmax(-1)
    if top_k is not None:
        probabilities_BV[:, top_k:] = 0.0
        probabilities_BV /= probabilities_BV.sum(-1, keepdim=True)
    if top_p is not None:
        before_BV = _running_sums(probabilities_BV) - probabilities_BV
        probabilities_BV[before_BV >= top_p] = 0.0
    cumulative_BV = _running_sums(probabilities_BV)
    targets_B1 = draws_B[:, None] * cumulative_BV[:, -1:]
    ranks_B1 = torch.searchsorted(cumulative_BV, targets_B1, right=True)
    return ids_BV.gather(-1, ranks_B1.clamp_(max=ids_BV.shape[-1] - 1))[:, 0]


def _running_sums(x_BV: Tensor) -> Tensor:
    """Sums of each token and those before it.

    Where deterministic algorithms are asked for, torch takes V^2 numbers of a GPU's memory for each
    row (34 GB at V = 65,536) or refuses, depending on its version. A CPU needs neither.
    """
    if x_BV.is_cuda and torch.are_deterministic_algorithms_enabled():
        return x_BV.cpu().cumsum(-1).to(x_BV.device)
    return x_BV.cumsum(-1)
