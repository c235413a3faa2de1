"""The loop of the fused recurrence, and what its backward pass will need.

Differences from the plain loop (model/core.py), which is the oracle:
- the adapter is split, A [s ; e] = A_s s + A_e e, and A_e e is computed once for all iterations;
- what an iteration keeps is chosen by hand, and freed as the backward pass goes (unwinding.py).
"""

# B rows  T tokens  D width  A active rows, a prefix of the sorted batch  N = A x T

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from pretrain.model.depth import Depth
from pretrain.model.fused.layer import LayerInput, Place, Saved, layer_forward
from pretrain.model.fused.weights import Float8Weights, LayerWeights
from pretrain.model.layout import Layout
from pretrain_kernels.norm_chain import norm_chain

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
        injected_BTD = flat(embedded_BTD).mm(self.adapter[1].t()).view_as(embedded_BTD)
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
            state_ND = flat(state_ATD)
            after_ND, kept = self.iterate(
                state_ND, flat(injected_BTD[: len(state_ATD)]), weights, place,
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
                weight, given, place, next_norm(weights, index),
                self._float8(index) if is_float8 else None,
            )  # fmt: skip
            if keeps:
                layers.append(saved)
        assert isinstance(given.normed_ND, Tensor)
        return given.normed_ND, Kept(first, layers) if keeps else None

    def recompute(self, state_ND: Tensor, place: Place) -> Kept:
        """What an iteration would have kept, from the state before it."""
        assert self.injected_BTD is not None
        injected_ND = flat(self.injected_BTD)[: len(state_ND)]
        _, kept = self.iterate(
            state_ND, injected_ND, self.weights, place, keeps=True, is_float8=self.float8_suffix
        )
        assert kept is not None
        return kept

    def finished_with(self, index: int) -> list[Tensor]:
        """The tensors whose gradients are whole when layer `index` of an iteration is done.

        Its own, less the gain of its first norm, which the layer before it uses; so that of the
        norm behind it.
        """
        weights = self.weights
        own = [tensor for tensor in weights[index] if tensor is not weights[index].norm_1]
        after = next_norm(weights, index)
        return own if after is None else [*own, after]

    def forget(self) -> None:
        """Let go of what the backward pass alone still needed."""
        self.float8 = self.injected_BTD = None
        self.places.clear()

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


def next_norm(weights: list[LayerWeights], index: int) -> Tensor | None:
    """The gain of the first norm of the layer behind, if there is one in this iteration."""
    return weights[index + 1].norm_1 if index + 1 < len(weights) else None


def flat(x_ATD: Tensor) -> Tensor:
    """[A x T, D]."""
    return x_ATD.flatten(0, 1)
