"""One sandwich layer, forward and backward, on fused kernels and without autograd.

    s2 = x + Wo attention(n1 x);     x1 = n2 s2
    s4 = x1 + Wd swiglu(Wg n3 x1);   x' = n4 s4          (arXiv 2502.05171, section 3)

The residual stream is carried as the sum before its norm, so x1 and x' are never stored; whoever
needs them recomputes them bit for bit. A layer is given n1 x by the layer before it and gives n1 x'
to the next: each norm is computed where its input is at hand.
"""

# N rows x tokens  D width  I inner width  B rows  T tokens  H heads  K head width

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.model.fused.attention import Attended, Backend, choose_backend
from pretrain.model.fused.products import GradientSums, input_gradient, project
from pretrain.model.fused.weights import Float8Weights, LayerWeights
from pretrain.model.layout import Layout
from pretrain_kernels.fp8 import Fp8
from pretrain_kernels.norm_chain import (
    Chained,
    norm_chain,
    norm_chain_backward,
    norm_chain_output,
)
from pretrain_kernels.qk_rope import qk_rope_, qk_rope_backward
from pretrain_kernels.quantize_rows import quantize_rows
from pretrain_kernels.swiglu import swiglu, swiglu_backward


@dataclass(frozen=True)
class Place:
    """What all layers of a pass share: which rows, where their tokens stand, and epsilon."""

    layout: Layout
    epsilon: float

    @property
    def angles(self) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every token, [N, P] each."""
        return self.layout.cos_BTP.flatten(0, 1), self.layout.sin_BTP.flatten(0, 1)


class LayerInput(NamedTuple):
    """What a layer is given: the residual stream, and n1 of it.

    x is sum_ND, or where rstd_N is given its norm with gain_D.
    """

    sum_ND: Tensor
    rstd_N: Tensor | None
    gain_D: Tensor | None
    normed_ND: Tensor | Fp8
    rstd_1_N: Tensor | None

    def normed(self, norm_1_D: Tensor) -> Tensor:
        """n1 x, whose gain is norm_1_D, computed again where it was made in float8."""
        if isinstance(self.normed_ND, Tensor):
            return self.normed_ND
        return norm_chain_output(self.sum_ND, self.rstd_N, self.gain_D, self.rstd_1_N, norm_1_D)

    @staticmethod
    def after(chained: Chained, gain_D: Tensor | None) -> "LayerInput":
        """What a chain leaves to the layer behind it; gain_D is that of the chain's first norm."""
        rstd_N, rstd_1_N = chained.rstd_a_N, chained.rstd_b_N
        return LayerInput(chained.sum_ND, rstd_N, gain_D, chained.out_ND, rstd_1_N)


class Saved(NamedTuple):
    """What the backward pass of a layer needs of its forward pass.

    In bf16 that is 16 D + 4 I bytes a token.
    """

    given: LayerInput
    qkv_N3HK: Tensor
    backend: Backend
    attended: Attended
    middle: LayerInput
    gate_up_N2I: Tensor
    after: LayerInput


def layer_forward(
    weights: LayerWeights,
    given: LayerInput,
    place: Place,
    next_norm_D: Tensor | None,
    float8: Float8Weights | None = None,
) -> tuple[LayerInput, Saved]:
    """The input of the next layer, whose first norm has the gain next_norm_D.

    Without a next layer `normed_ND` is x' itself. With float8 weights all products but attention's
    run in float8, and `given.normed_ND` must be float8 too.
    """
    is_float8 = float8 is not None
    matrices = weights if float8 is None else float8.by_output
    rows, tokens, _ = place.layout.cos_BTP.shape
    # Wo attention(n1 x)
    qkv_NX = project(given.normed_ND, matrices.qkv)
    qkv_N3HK = qkv_NX.view(rows * tokens, 3, *weights.qk_bias.shape[-2:])
    qk_rope_(qkv_N3HK, weights.qk_bias.squeeze(1), *place.angles)
    q, k, v = _heads(qkv_N3HK, rows)
    backend = choose_backend(q, place.layout)
    attended = backend.forward(q, k, v, place.layout)
    mixed_ND = _flat(attended.mixed_BHTK)
    branch_ND = project(quantize_rows(mixed_ND) if is_float8 else mixed_ND, matrices.output)
    # s2 = x + that;  x1 = n2 s2;  n3 x1
    middle = LayerInput.after(
        norm_chain(
            branch_ND, given.sum_ND, rstd_N=given.rstd_N, gain_D=given.gain_D,
            gain_a_D=weights.norm_2, gain_b_D=weights.norm_3, epsilon=place.epsilon,
            sum_out=branch_ND, fp8=is_float8,
        ),
        weights.norm_2,
    )  # fmt: skip
    # Wd swiglu(Wg n3 x1)
    gate_up_N2I = project(middle.normed_ND, matrices.gate_up)
    branch_ND = project(swiglu(gate_up_N2I, fp8=is_float8), matrices.down)
    # s4 = x1 + that;  x' = n4 s4;  the next layer's n1 x'
    after = LayerInput.after(
        norm_chain(
            branch_ND, middle.sum_ND, rstd_N=middle.rstd_N, gain_D=middle.gain_D,
            gain_a_D=weights.norm_4, gain_b_D=next_norm_D, epsilon=place.epsilon,
            sum_out=branch_ND, fp8=is_float8 and next_norm_D is not None,
        ),
        weights.norm_4,
    )  # fmt: skip
    return after, Saved(given, qkv_N3HK, backend, attended, middle, gate_up_N2I, after)


def layer_backward(
    weights: LayerWeights,
    saved: Saved,
    place: Place,
    next_norm_D: Tensor | None,
    sums: GradientSums,
    dnormed_ND: Tensor,
    dx_ND: Tensor | None,
    float8: Float8Weights | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of n1 x and of the residual stream x, given those of what forward gave.

    dx_ND is the gradient of x' from the residual stream behind; `dnormed_ND` that of the next
    layer's n1 x', or of x' itself where there is none. Gradients of weights are added to `sums`.
    `saved.gate_up_N2I` is overwritten. With float8 weights, products with weights run in float8;
    sums of weight gradients never do.
    """
    rows = place.layout.cos_BTP.shape[0]
    middle, after = saved.middle, saved.after
    narrow = None if float8 is None else float8.by_input
    # the next layer's n1 x';  x' = n4 s4
    ds4_ND = norm_chain_backward(
        dnormed_ND, dx_ND, after.sum_ND,
        rstd_a_N=after.rstd_N, gain_a_D=weights.norm_4, dgain_a_D=sums.vector(weights.norm_4),
        rstd_b_N=after.rstd_1_N, gain_b_D=next_norm_D,
        dgain_b_D=None if next_norm_D is None else sums.vector(next_norm_D),
    )  # fmt: skip
    # s4 = x1 + Wd swiglu(Wg n3 x1): ds4 is also the gradient of x1
    dhidden_NI = input_gradient(ds4_ND, weights.down, narrow and narrow.down)
    hidden_NI = torch.empty_like(dhidden_NI)
    dgate_up_N2I = swiglu_backward(
        dhidden_NI, saved.gate_up_N2I, out=saved.gate_up_N2I, hidden_out=hidden_NI
    )
    sums.add_product(weights.down, ds4_ND, hidden_NI)
    del dhidden_NI, hidden_NI
    dmiddle_ND = input_gradient(dgate_up_N2I, weights.gate_up, narrow and narrow.gate_up)
    sums.add_product(weights.gate_up, dgate_up_N2I, middle.normed(weights.norm_3))
    # n3 x1;  x1 = n2 s2
    ds2_ND = norm_chain_backward(
        dmiddle_ND, ds4_ND, middle.sum_ND,
        rstd_a_N=middle.rstd_N, gain_a_D=weights.norm_2, dgain_a_D=sums.vector(weights.norm_2),
        rstd_b_N=middle.rstd_1_N, gain_b_D=weights.norm_3, dgain_b_D=sums.vector(weights.norm_3),
    )  # fmt: skip
    # s2 = x + Wo attention(n1 x): ds2 is also the gradient of x
    dmixed_ND = input_gradient(ds2_ND, weights.output, narrow and narrow.output)
    mixed_BHTK = saved.attended.mixed_BHTK
    sums.add_product(weights.output, ds2_ND, _flat(mixed_BHTK))
    q, k, v = _heads(saved.qkv_N3HK, rows)
    dmixed_BHTK = dmixed_ND.view(mixed_BHTK.transpose(1, 2).shape).transpose(1, 2)
    gradients = saved.backend.backward(dmixed_BHTK, q, k, v, saved.attended, place.layout)
    dq_BTHK, dk_BTHK, dv_BTHK = (gradient.transpose(1, 2) for gradient in gradients)
    dqkv_N3HK = qk_rope_backward(
        dq_BTHK, dk_BTHK, dv_BTHK, *place.angles,
        dbias_2HK=sums.vector(weights.qk_bias).squeeze(1),
    )  # fmt: skip
    dqkv_NX = dqkv_N3HK.flatten(1)
    sums.add_product(weights.qkv, dqkv_NX, saved.given.normed(weights.norm_1))
    return input_gradient(dqkv_NX, weights.qkv, narrow and narrow.qkv), ds2_ND


def _heads(qkv_N3HK: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of queries, keys and values, [B, H, T, K] each."""
    q, k, v = qkv_N3HK.unflatten(0, (rows, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _flat(mixed_BHTK: Tensor) -> Tensor:
    """[N, D], without a copy where attention wrote it token by token."""
    return mixed_BHTK.transpose(1, 2).flatten(2).flatten(0, 1)
