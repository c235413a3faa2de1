"""Cross-entropy in nats, with a weight for every token, without ever holding all logits."""

# N tokens  D width  V vocabulary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pretrain.model.config import CHUNK_TOKENS

# Labels with this value do not count.
IGNORED = -100


def cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Nats of each token, float32 (float64 for float64); 0 where the label is ignored."""
    wide_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return F.cross_entropy(wide_NV, labels_N, ignore_index=IGNORED, reduction="none")


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, *, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """`cross_entropy(hidden @ weight.T, labels)` with the logits of one chunk in memory at a time.

    The backward pass computes a chunk's logits again, except those of the last chunk: it is
    differentiated first, so that keeping its logits costs no memory at the peak.
    """
    chunks = range(0, hidden_ND.shape[0], chunk_tokens)
    nats = []
    for start in chunks:
        span = slice(start, start + chunk_tokens)
        arguments = (hidden_ND[span], weight_VD, labels_N[span])
        if torch.is_grad_enabled() and start != chunks[-1]:
            nats.append(
                checkpoint(_chunk_nats, *arguments, use_reentrant=False, preserve_rng_state=False)
            )
        else:
            nats.append(_chunk_nats(*arguments))
    return torch.cat(nats)


def _chunk_nats(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    return cross_entropy(F.linear(hidden_ND, weight_VD), labels_N)


@torch.no_grad()
def divergence(
    first_ND: Tensor, second_ND: Tensor, weight_VD: Tensor, *, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """KL(p || q) in nats of each token, where p and q are what the head makes of two vectors.

    Float32 or wider [N]; the logits of one chunk are in memory at a time, twice.
    """
    found = []
    for start in range(0, first_ND.shape[0], chunk_tokens):
        span = slice(start, start + chunk_tokens)
        logs = []
        for hidden_ND in (first_ND, second_ND):
            logits_NV = F.linear(hidden_ND[span], weight_VD)
            wide = torch.promote_types(logits_NV.dtype, torch.float32)
            logs.append(logits_NV.to(wide).log_softmax(-1))
        found.append((logs[0].exp() * (logs[0] - logs[1])).sum(-1))
    return torch.cat(found)


def weighted_sum(
    nats: Tensor, labels: Tensor, weights: Tensor | None, *, dim: int | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of weight x nats and sum of weights over the labels that count; all three one shape.

    Weights default to 1. Over everything, or over one dimension.
    """
    counted = (labels != IGNORED).to(nats.dtype)
    if weights is not None:
        counted = counted * weights
    return (nats * counted).sum(dim), counted.sum(dim)
