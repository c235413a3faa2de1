"""The linear layer, its cross-entropy and both gradients, a chunk of tokens at a time."""

# N tokens  C tokens of a chunk  D width  V vocabulary

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Holds the logits of one chunk; the backward pass computes those of other chunks again.

    Its first chunk is the last of the forward pass, whose logits are still there. The gradient
    of the weight is summed over chunks in float32 and rounded once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        z_loss: float,
        chunk_tokens: int,
        softmax: ModuleType,
    ) -> Tensor:
        """Nats of each token. `softmax` is `reference` or `triton` of this folder."""
        num_tokens = len(hidden_ND)
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        nats_N, lse_N = (
            torch.empty(num_tokens, dtype=wide, device=hidden_ND.device) for _ in range(2)
        )
        logits_CV = hidden_ND.new_empty(min(num_tokens, chunk_tokens), len(weight_VD))
        for start in range(0, num_tokens, chunk_tokens):
            span = slice(start, min(start + chunk_tokens, num_tokens))
            part_CV = logits_CV[: span.stop - start]
            torch.mm(hidden_ND[span], weight_VD.t(), out=part_CV)
            nats_N[span], lse_N[span] = softmax.nats_and_lse(part_CV, labels_N[span], z_loss=z_loss)
        ctx.save_for_backward(hidden_ND, weight_VD, labels_N, lse_N)
        ctx.z_loss, ctx.chunk_tokens, ctx.softmax = z_loss, chunk_tokens, softmax
        # not among the saved tensors: backward overwrites it, and a second one does without
        ctx.last_logits_CV = logits_CV if any(ctx.needs_input_grad[:2]) else None
        return nats_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden and weight, as far as somebody wants them."""
        hidden_ND, weight_VD, labels_N, lse_N = ctx.saved_tensors
        kept_CV, ctx.last_logits_CV = ctx.last_logits_CV, None
        num_tokens, is_kept = len(hidden_ND), kept_CV is not None
        logits_CV = kept_CV
        if logits_CV is None:
            logits_CV = hidden_ND.new_empty(min(num_tokens, ctx.chunk_tokens), len(weight_VD))
        upstream_N = upstream_N.contiguous()
        dhidden_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        sum_VD = WeightGradient(weight_VD) if ctx.needs_input_grad[1] else None
        for start in reversed(range(0, num_tokens, ctx.chunk_tokens)):
            span = slice(start, min(start + ctx.chunk_tokens, num_tokens))
            part_CV = logits_CV[: span.stop - start]
            if not is_kept:
                torch.mm(hidden_ND[span], weight_VD.t(), out=part_CV)
            is_kept = False
            ctx.softmax.logits_to_gradient_(
                part_CV, labels_N[span], lse_N[span], upstream_N[span], z_loss=ctx.z_loss
            )
            if dhidden_ND is not None:
                torch.mm(part_CV, weight_VD, out=dhidden_ND[span])
            if sum_VD is not None:
                sum_VD.add(part_CV, hidden_ND[span], is_only=num_tokens <= ctx.chunk_tokens)
        dweight_VD = None if sum_VD is None else sum_VD.rounded()
        return dhidden_ND, dweight_VD, None, None, None, None


class WeightGradient:
    """The sum over chunks of dlogits^T hidden, in float32 at least."""

    def __init__(self, weight_VD: Tensor) -> None:
        self.like_VD = weight_VD
        self.sum_VD: Tensor | None = None

    def add(self, dlogits_CV: Tensor, hidden_CD: Tensor, *, is_only: bool) -> None:
        """Add a chunk. The only one needs no wide sum: its product is rounded once as it is."""
        if is_only:
            self.sum_VD = dlogits_CV.t() @ hidden_CD
            return
        wide = torch.promote_types(self.like_VD.dtype, torch.float32)
        if self.sum_VD is None:
            self.sum_VD = torch.zeros_like(self.like_VD, dtype=wide)
        if hidden_CD.is_cuda and hidden_CD.dtype != wide:
            torch.addmm(self.sum_VD, dlogits_CV.t(), hidden_CD, out_dtype=wide, out=self.sum_VD)
        else:
            self.sum_VD.addmm_(dlogits_CV.t().to(wide), hidden_CD.to(wide))

    def rounded(self) -> Tensor:
        """In the weight's own type; zeros if no chunk was added."""
        if self.sum_VD is None:
            return torch.zeros_like(self.like_VD)
        return self.sum_VD.to(self.like_VD.dtype)
