"""The whole recurrence as one step of autograd: its loop forward, and its loop backward.

Differences from the plain loop (model/core.py), which is the oracle:
- the adapter is split, A [s ; e] = A_s s + A_e e, and A_e e is computed once for all iterations;
- each weight's gradient over all iterations is summed in float32 inside the matrix product, and
  returned once, so hooks of an engine fire once;
- what an iteration keeps is chosen by hand, and freed as the backward loop goes.
"""

# B rows  T tokens  D width  A active rows, a prefix of the sorted batch  N = A x T

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pretrain.model.depth import Depth
from pretrain.model.fused.block import taken_once
from pretrain.model.fused.layer import (
    LayerInput,
    Place,
    Saved,
    layer_backward,
    layer_forward,
)
from pretrain.model.fused.products import GradientSums
from pretrain.model.fused.weights import Float8Weights, LayerWeights
from pretrain.model.layout import Layout
from pretrain_kernels.norm_chain import norm_chain, norm_chain_backward

if TYPE_CHECKING:
    from pretrain.model.block import SandwichBlock
    from pretrain.model.core import CoreIteration


class Pass(NamedTuple):
    """One iteration of the active rows, and what its backward pass needs."""

    state_ND: Tensor
    """Before the iteration."""
    place: Place
    kept: "Kept | None"
    """None: computed again in the backward pass."""


class Kept(NamedTuple):
    """The intermediate results of one iteration."""

    first: LayerInput
    layers: list[Saved]
    """Emptied by the backward pass, last layer first."""


@dataclass
class Recurrence:
    """What the loop runs: the modules, the rows' depths (deepest first), and what it keeps."""

    iteration: "CoreIteration"
    """Whose weights are used, read anew in the backward pass."""
    depths: Sequence[Depth]
    layout: Layout
    epsilon: float
    kept_iterations: int
    """Of the iterations with gradient, the last so many keep their intermediate results."""
    float8_prefix: bool
    """Whether iterations without gradient multiply in float8."""
    float8_suffix: bool
    """Whether those with gradient do, and their input gradients; weight gradients never do."""
    see: Callable[[int, Tensor], None]
    """Called with the number of iterations done and the active rows' state [A, T, D]."""
    passes: list[Pass] = field(default_factory=list)
    places: dict[int, Place] = field(default_factory=dict)
    """By the number of active rows."""
    injected_BTD: Tensor | None = None
    """A_e e, while there is something to compute again."""
    float8: list[Float8Weights] | None = None
    """Of each layer, from the beginning of the forward pass to the end of the backward pass."""

    @property
    def weights(self) -> list[LayerWeights]:
        """Of each layer."""
        return [LayerWeights.of(layer) for layer in self.iteration.layers]

    @property
    def adapter(self) -> tuple[Tensor, Tensor]:
        """Views of what multiplies the state and of what multiplies the embedded tokens."""
        assert self.iteration.adapter is not None
        state_DD, embedded_DD = self.iteration.adapter.chunk(2, dim=1)
        return state_DD, embedded_DD

    @property
    def gradient_iterations(self) -> int:
        """Of the row that has most."""
        return max(depth.with_grad for depth in self.depths)

    def run(self, embedded_BTD: Tensor, start_BTD: Tensor, *, keeps: bool) -> Tensor:
        """The state of each row after its own depth, [B, T, D]; `passes` fills up if `keeps`."""
        weights, total = self.weights, self.depths[0].total
        injected_BTD = _flat(embedded_BTD).mm(self.adapter[1].t()).view_as(embedded_BTD)
        is_all_kept = self.kept_iterations >= self.gradient_iterations
        self.injected_BTD = injected_BTD if keeps and not is_all_kept else None
        if self.float8_suffix or (self.float8_prefix and total > self.gradient_iterations):
            # once for all iterations, and under fixed_weights once for all passes
            has_gradient = self.float8_suffix and keeps
            self.float8 = [
                cast("SandwichBlock", layer).float8_copies.of(weight, has_gradient=has_gradient)
                for layer, weight in zip(self.iteration.layers, weights, strict=True)
            ]
        state_ATD = start_BTD[:0]
        for left in range(total, 0, -1):
            state_ATD = self._join(state_ATD, start_BTD, left)
            place = self._place(len(state_ATD))
            has_grad = left <= self.gradient_iterations
            state_ND = _flat(state_ATD)
            after_ND, kept = self.iterate(
                state_ND, _flat(injected_BTD[: len(state_ATD)]), weights, place,
                keeps=keeps and has_grad and left <= self.kept_iterations,
                is_float8=self.float8_suffix if has_grad else self.float8_prefix,
            )  # fmt: skip
            if has_grad and keeps:
                self.passes.append(Pass(state_ND, place, kept))
            state_ATD = after_ND.view_as(state_ATD)
            self.see(total - left + 1, state_ATD)
        if not (self.float8_suffix and keeps):
            self.float8 = None
        return state_ATD

    def iterate(
        self,
        state_ND: Tensor,
        injected_ND: Tensor,
        weights: list[LayerWeights],
        place: Place,
        *,
        keeps: bool,
        is_float8: bool,
    ) -> tuple[Tensor, Kept | None]:
        """s <- layers(A_s s + A_e e), and with `keeps` all that its backward pass needs."""
        branch_ND = state_ND.mm(self.adapter[0].t())
        chained = norm_chain(
            branch_ND, injected_ND, gain_b_D=weights[0].norm_1, epsilon=place.epsilon,
            sum_out=branch_ND, fp8=is_float8,
        )  # fmt: skip
        first = given = LayerInput.after(chained, None)
        layers = []
        for index, weight in enumerate(weights):
            given, saved = layer_forward(
                weight, given, place, _next_norm(weights, index),
                self._float8(index) if is_float8 else None,
            )  # fmt: skip
            if keeps:
                layers.append(saved)
        assert isinstance(given.normed_ND, Tensor)
        return given.normed_ND, Kept(first, layers) if keeps else None

    def recompute(self, state_ND: Tensor, place: Place) -> Kept:
        """What an iteration would have kept, from the state before it."""
        assert self.injected_BTD is not None
        injected_ND = _flat(self.injected_BTD)[: len(state_ND)]
        _, kept = self.iterate(
            state_ND, injected_ND, self.weights, place, keeps=True, is_float8=self.float8_suffix
        )
        assert kept is not None
        return kept

    def iterate_backward(
        self, kept: Kept, place: Place, sums: GradientSums, dstate_ND: Tensor
    ) -> Tensor:
        """The gradient of A_s s + A_e e, [N, D], given that of the state after the iteration."""
        weights = self.weights
        dnormed_ND, dstream_ND = dstate_ND, None
        for index in reversed(range(len(weights))):
            dnormed_ND, dstream_ND = layer_backward(
                weights[index], kept.layers.pop(), place, _next_norm(weights, index), sums,
                dnormed_ND, dstream_ND, self._float8(index) if self.float8_suffix else None,
            )  # fmt: skip
        return norm_chain_backward(
            dnormed_ND, dstream_ND, kept.first.sum_ND,
            rstd_a_N=None, gain_a_D=None,
            rstd_b_N=kept.first.rstd_1_N, gain_b_D=weights[0].norm_1,
            dgain_b_D=sums.vector(weights[0].norm_1),
        )  # fmt: skip

    def cut(self, dstate_ATD: Tensor, left: int) -> Tensor:
        """The gradient of the state after the iteration that is `left`-th from the end.

        Rows that joined later drop out; rows whose own gradient ends later give nothing.
        """
        active = sum(depth.total >= left for depth in self.depths)
        dstate_ATD = dstate_ATD[:active]
        is_over = [depth.with_grad < left for depth in self.depths[:active]]
        if not any(is_over):
            return dstate_ATD
        is_over_A11 = torch.tensor(is_over, device=dstate_ATD.device)[:, None, None]
        return dstate_ATD.masked_fill(is_over_A11, 0)

    def _place(self, active: int) -> Place:
        """Of the first rows: the same object each time, because masks are built once for each."""
        if active not in self.places:
            is_all = active == len(self.depths)
            layout = self.layout if is_all else self.layout.rows(slice(active))
            self.places[active] = Place(layout, self.epsilon)
        return self.places[active]

    def _float8(self, index: int) -> Float8Weights:
        assert self.float8 is not None
        return self.float8[index]

    def _join(self, state_ATD: Tensor, start_BTD: Tensor, left: int) -> Tensor:
        """The active rows with those whose depth is `left`."""
        active = sum(depth.total >= left for depth in self.depths)
        if active == len(state_ATD):
            return state_ATD
        joining = start_BTD[len(state_ATD) : active]
        return torch.cat((state_ATD, joining)) if len(state_ATD) else joining


def fused_core(recurrence: Recurrence, embedded_BTD: Tensor, start_BTD: Tensor) -> Tensor:
    """The state of each row after its own depth [B, T, D]; no gradient reaches start_BTD."""
    assert recurrence.iteration.adapter is not None
    parameters: list[Tensor] = [recurrence.iteration.adapter]
    parameters += [weight for weights in recurrence.weights for weight in weights]
    needs_grad = any(tensor.requires_grad for tensor in (embedded_BTD, *parameters))
    keeps = torch.is_grad_enabled() and needs_grad and recurrence.gradient_iterations > 0
    if not keeps:
        with torch.no_grad():
            return recurrence.run(embedded_BTD, start_BTD, keeps=False)
    state_BTD: Tensor = _Core.apply(recurrence, embedded_BTD, start_BTD, *parameters)
    return state_BTD


class _Core(Function):
    """The parameters are arguments so that autograd asks for their gradients, once each."""

    @staticmethod
    def forward(
        ctx: Any,
        recurrence: Recurrence,
        embedded_BTD: Tensor,
        start_BTD: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.recurrence = recurrence
        # the start, too, is a state to differentiate at: autograd notices if somebody writes there
        ctx.save_for_backward(embedded_BTD, start_BTD)
        return recurrence.run(embedded_BTD, start_BTD, keeps=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstate_BTD: Tensor) -> tuple[Tensor | None, ...]:
        recurrence: Recurrence = taken_once(ctx.recurrence)
        ctx.recurrence = None
        embedded_BTD, _ = ctx.saved_tensors
        adapter, width = recurrence.iteration.adapter, embedded_BTD.shape[-1]
        assert adapter is not None
        on_state_DD, on_embedded_DD = recurrence.adapter
        sums = GradientSums(uses=len(recurrence.passes))
        wide = torch.promote_types(embedded_BTD.dtype, torch.float32)
        # contiguous whatever embedded_BTD is: it is added to through a flat view
        dinjected_BTD = embedded_BTD.new_zeros(embedded_BTD.shape, dtype=wide)
        dstate_ATD = dstate_BTD.contiguous()
        for left in range(1, len(recurrence.passes) + 1):
            state_ND, place, kept = recurrence.passes.pop()
            dstate_ATD = recurrence.cut(dstate_ATD, left)
            if kept is None:
                kept = recurrence.recompute(state_ND, place)
            dsum_ND = recurrence.iterate_backward(kept, place, sums, _flat(dstate_ATD))
            del kept
            _flat(dinjected_BTD)[: len(dsum_ND)].add_(dsum_ND)
            sums.add_product(adapter, dsum_ND, state_ND, slice(0, width))
            if recurrence.passes:
                dstate_ATD = dsum_ND.mm(on_state_DD).view_as(dstate_ATD)
        recurrence.float8 = recurrence.injected_BTD = None
        recurrence.places.clear()
        dinjected_ND = _flat(dinjected_BTD).to(embedded_BTD.dtype)
        sums.add_product(adapter, dinjected_ND, _flat(embedded_BTD), slice(width, 2 * width))
        dembedded_BTD = dinjected_ND.mm(on_embedded_DD).view_as(embedded_BTD)
        parameters = [weight for weights in recurrence.weights for weight in weights]
        gradients = (sums.take(parameter) for parameter in (adapter, *parameters))
        return None, dembedded_BTD, None, *gradients


def _next_norm(weights: list[LayerWeights], index: int) -> Tensor | None:
    """The gain of the first norm of the layer behind, if there is one in this iteration."""
    return weights[index + 1].norm_1 if index + 1 < len(weights) else None


def _flat(x_ATD: Tensor) -> Tensor:
    return x_ATD.flatten(0, 1)
