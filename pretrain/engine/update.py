"""The update of this rank's partitions: norms, clipping, weights and their bf16 copies.

With ELLISAdam it takes 4 + 36 + 2 bytes per parameter in three passes: the squares of all tensors
at once, which give the global norm and those by part; the moments, which clip as they read; the
weights, which are rounded as they are written. Each engine that gets its gradients summed and
whole in fp32 partitions can use it (`takeover`).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.optim.adamw import AdamW
from pretrain.optim.ellis_adam import EllisAdam
from pretrain.optim.part_norms import named_norms, sum_by_part
from pretrain.optim.slices import Layout
from pretrain_kernels.square_sums import square_sums

# What DeepSpeed adds to the norm before it divides by it.
EPSILON = 1e-6


class Update:
    """One optimizer step over all partitions of a layout, or none on any rank."""

    def __init__(
        self,
        optimizer: EllisAdam | AdamW,
        layout: Layout,
        rounded: Sequence[Tensor],
        *,
        clip: float,
    ) -> None:
        """`rounded` are this rank's working weights, as the partitions; clip=0 does not clip."""
        self.is_applied = False
        self._optimizer, self._layout, self._clip = optimizer, layout, clip
        self._flats = [partition.flat for partition in layout.partitions]
        self._rounded = dict(zip(self._flats, rounded, strict=True))
        self._spans = [partition.spans() for partition in layout.partitions]
        self._names = [info.name for part in layout.partitions for info in part.tensors]
        self._squares = torch.empty(0)

    @torch.no_grad()
    def __call__(self, gradients: Sequence[Tensor]) -> float:
        """Update from the partitions' fp32 gradients, and leave those to be overwritten.

        All ranks call it. Returns the global norm before clipping; if that is not finite, it is
        inf, nothing has changed anywhere, and `is_applied` is False. A held optimizer changes
        nothing either.
        """
        pairs = zip(gradients, self._spans, strict=True)
        self._squares = torch.cat([square_sums(gradient, spans) for gradient, spans in pairs])
        # A sum over ranks for each tensor: float64, so the ranks' number hardly shows in the norm.
        self._layout.reduce(self._squares)
        norm = math.sqrt(float(self._squares.sum()))
        self.is_applied = math.isfinite(norm) and not self._optimizer.is_held
        if self.is_applied:
            for flat, gradient in zip(self._flats, gradients, strict=True):
                flat.grad = gradient
            self._optimizer.update(self._factor(norm), self._rounded)
            for flat in self._flats:
                flat.grad = None
        return norm if math.isfinite(norm) else math.inf

    def part_norms(self) -> dict[str, float]:
        """gradient/norm_PART of the last step before clipping; empty if it was not finite."""
        sums = sum_by_part(self._names, self._squares)
        return named_norms(sums) if bool(sums.isfinite().all()) else {}

    def _factor(self, norm: float) -> float:
        return min(1.0, self._clip / (norm + EPSILON)) if self._clip else 1.0
