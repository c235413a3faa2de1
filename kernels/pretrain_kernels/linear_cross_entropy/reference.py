"""Cross-entropy of a linear layer with all logits in memory: slow, large, obviously right."""

# N tokens  D width  V vocabulary

import torch
from torch import Tensor

# Labels with this value do not count.
IGNORED = -100


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, *, z_loss: float = 0.0
) -> Tensor:
    """Nats of each token; autograd differentiates it."""
    nats_N, _ = nats_and_lse(hidden_ND @ weight_VD.T, labels_N, z_loss=z_loss)
    return nats_N


def nats_and_lse(logits_NV: Tensor, labels_N: Tensor, *, z_loss: float) -> tuple[Tensor, Tensor]:
    """Nats and log-sum-exp of each row, float32 (float64 for float64).

    nats = lse - logit of the label + z_loss x lse^2; 0 where the label is IGNORED, NaN where it
    is neither that nor in [0, V).
    """
    wide_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    lse_N = torch.logsumexp(wide_NV, dim=1)
    is_inside_N = (labels_N >= 0) & (labels_N < logits_NV.shape[1])
    inside_N1 = torch.where(is_inside_N, labels_N, 0)[:, None]
    nats_N = lse_N - wide_NV.gather(1, inside_N1)[:, 0] + z_loss * lse_N.square()
    nats_N = torch.where(is_inside_N, nats_N, torch.nan)
    return torch.where(labels_N == IGNORED, 0.0, nats_N), lse_N


def logits_to_gradient_(
    logits_NV: Tensor, labels_N: Tensor, lse_N: Tensor, upstream_N: Tensor, *, z_loss: float
) -> None:
    """Overwrite logits with the gradient of sum(upstream x nats) with respect to them.

    upstream x ((1 + 2 z_loss lse) softmax - onehot); rows of 0 and NaN as in `nats_and_lse`.
    """
    wide_NV = logits_NV.to(lse_N.dtype)
    is_inside_N = (labels_N >= 0) & (labels_N < logits_NV.shape[1])
    inside_N1 = torch.where(is_inside_N, labels_N, 0)[:, None]
    gradient_NV = torch.exp(wide_NV - lse_N[:, None]) * (1 + 2 * z_loss * lse_N)[:, None]
    gradient_NV.scatter_add_(1, inside_N1, torch.full_like(inside_N1, -1, dtype=lse_N.dtype))
    gradient_NV *= torch.where(is_inside_N, upstream_N, torch.nan)[:, None]
    logits_NV.copy_(gradient_NV.masked_fill_((labels_N == IGNORED)[:, None], 0.0))
