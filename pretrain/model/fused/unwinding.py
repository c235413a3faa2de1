"""The backward pass of the fused recurrence.

Each weight's gradient over all iterations is summed in float32 inside the matrix product, and given
out once, so hooks of an engine fire once.
"""

# B rows  T tokens  D width  A active rows, a prefix of the sorted batch  N = A x T

import torch
from torch import Tensor

from pretrain.model.fused.layer import Place, layer_backward
from pretrain.model.fused.products import GradientSums
from pretrain.model.fused.recurrence import Kept, Recurrence, flat, next_norm
from pretrain_kernels.norm_chain import norm_chain_backward


class Unwinding:
    """The backward pass of a recurrence, iteration by iteration and layer by layer from the end."""

    def __init__(self, recurrence: Recurrence, embedded_BTD: Tensor, dstate_BTD: Tensor) -> None:
        """Begin with the gradient of the last states, contiguous."""
        self.recurrence, self.embedded_BTD = recurrence, embedded_BTD
        self.sums = GradientSums(uses=len(recurrence.passes))
        wide = torch.promote_types(embedded_BTD.dtype, torch.float32)
        # contiguous whatever embedded_BTD is: it is added to through a flat view
        self.dinjected_BTD = embedded_BTD.new_zeros(embedded_BTD.shape, dtype=wide)
        self.left = 0
        self.state_ND: Tensor
        self.place: Place
        self.kept: Kept
        self.dnormed_ND: Tensor
        self.dstream_ND: Tensor | None
        self._enter_iteration(dstate_BTD)

    def to_first_iteration(self) -> None:
        """Undo all iterations but the first one with gradient."""
        on_state_DD, _ = self.recurrence.adapter
        _, tokens, width = self.embedded_BTD.shape
        while self.recurrence.passes:
            for index in reversed(range(len(self.recurrence.weights))):
                self.layer(index)
            self._enter_iteration(self.injection().mm(on_state_DD).view(-1, tokens, width))

    def layer(self, index: int) -> None:
        """Undo a layer of the iteration."""
        recurrence, weights = self.recurrence, self.recurrence.weights
        float8 = recurrence.float8
        self.dnormed_ND, self.dstream_ND = layer_backward(
            weights[index], self.kept.layers.pop(), self.place, next_norm(weights, index),
            self.sums, self.dnormed_ND, self.dstream_ND,
            float8[index] if float8 is not None and recurrence.float8_suffix else None,
        )  # fmt: skip

    def injection(self) -> Tensor:
        """Undo the norm in front of the first layer: the gradient of A_s s + A_e e, [N, D]."""
        recurrence, first = self.recurrence, self.kept.first
        norm_1 = recurrence.weights[0].norm_1
        dsum_ND = norm_chain_backward(
            self.dnormed_ND, self.dstream_ND, first.sum_ND,
            rstd_a_N=None, gain_a_D=None,
            rstd_b_N=first.rstd_1_N, gain_b_D=norm_1, dgain_b_D=self.sums.vector(norm_1),
        )  # fmt: skip
        flat(self.dinjected_BTD)[: len(dsum_ND)].add_(dsum_ND)
        self._add_to_adapter(dsum_ND, self.state_ND, 0)
        return dsum_ND

    def embedded(self) -> Tensor:
        """Undo the first injection and A_e e: the gradient of the embedded tokens, [B, T, D]."""
        self.injection()
        _, on_embedded_DD = self.recurrence.adapter
        dinjected_ND = flat(self.dinjected_BTD).to(self.embedded_BTD.dtype)
        self._add_to_adapter(dinjected_ND, flat(self.embedded_BTD), 1)
        return dinjected_ND.mm(on_embedded_DD).view_as(self.embedded_BTD)

    def _enter_iteration(self, dstate_ATD: Tensor) -> None:
        """Take up the pass before, given the gradient of the states behind it."""
        self.left += 1
        self.state_ND, self.place, kept = self.recurrence.passes.pop()
        self.dnormed_ND = flat(self._cut(dstate_ATD))
        self.dstream_ND = None
        self.kept = self.recurrence.recompute(self.state_ND, self.place) if kept is None else kept

    def _cut(self, dstate_ATD: Tensor) -> Tensor:
        """The gradient of the state after the iteration that is `left`-th from the end.

        Rows that joined later drop out; rows whose own gradient ends later give nothing.
        """
        depths = self.recurrence.depths
        active = sum(depth.total >= self.left for depth in depths)
        dstate_ATD = dstate_ATD[:active]
        is_over = [depth.with_grad < self.left for depth in depths[:active]]
        if not any(is_over):
            return dstate_ATD
        is_over_A11 = torch.tensor(is_over, device=dstate_ATD.device)[:, None, None]
        return dstate_ATD.masked_fill(is_over_A11, 0)

    def _add_to_adapter(self, dsum_ND: Tensor, x_ND: Tensor, half: int) -> None:
        adapter, width = self.recurrence.iteration.adapter, x_ND.shape[1]
        assert adapter is not None
        columns = slice(half * width, (half + 1) * width)
        self.sums.add_product(adapter, dsum_ND, x_ND, columns)
