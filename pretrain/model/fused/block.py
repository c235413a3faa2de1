"""A layer of prelude or coda as one step of autograd."""

# B rows  T tokens  D width

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pretrain.model.fused.layer import (
    LayerInput,
    Place,
    layer_backward,
    layer_forward,
)
from pretrain.model.fused.products import GradientSums
from pretrain.model.fused.weights import Float8Copies, Float8Weights, LayerWeights
from pretrain.model.layout import Layout
from pretrain_kernels.norm_chain import norm_chain, norm_chain_backward


def fused_block(
    block: nn.Module,
    x_BTD: Tensor,
    layout: Layout,
    epsilon: float,
    *,
    copies: Float8Copies | None,
) -> Tensor:
    """A sandwich layer of [B, T, D]; its backward pass is written by hand.

    With `copies`, those of the block, it multiplies in float8.
    """
    place = Place(layout, epsilon)
    weights = LayerWeights.of(block)
    keeps = torch.is_grad_enabled() and any(t.requires_grad for t in (x_BTD, *weights))
    float8 = None if copies is None else copies.of(weights, has_gradient=keeps)
    output: Tensor = _Block.apply(block, place, float8, keeps, x_BTD, *weights)
    return output


class _Block(Function):
    """The parameters are arguments so that autograd asks for their gradients, once each."""

    @staticmethod
    def forward(
        ctx: Any,
        block: nn.Module,
        place: Place,
        float8: Float8Weights | None,
        keeps: bool,
        x_BTD: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        weights = LayerWeights.of(block)
        chained = norm_chain(
            None, x_BTD.contiguous().flatten(0, 1),
            gain_b_D=weights.norm_1, epsilon=place.epsilon, fp8=float8 is not None,
        )  # fmt: skip
        given = LayerInput.after(chained, None)
        after, saved = layer_forward(weights, given, place, None, float8)
        ctx.block, ctx.place, ctx.float8 = block, place, float8 if keeps else None
        # `saved` may hold the memory of x: so autograd notices if somebody writes there
        ctx.save_for_backward(x_BTD)
        # the rest not that way, which is for inputs and outputs; the output is a view made below,
        # so no cycle arises
        ctx.saved = (chained, saved) if keeps else None
        normed_ND = after.normed_ND
        assert isinstance(normed_ND, Tensor)
        return normed_ND.view_as(x_BTD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_BTD: Tensor) -> tuple[Tensor | None, ...]:
        weights, place = LayerWeights.of(ctx.block), ctx.place
        (chained, saved), ctx.saved = taken_once(ctx.saved), None
        # raises if x has been written to
        _ = ctx.saved_tensors
        sums = GradientSums.once()
        dnormed_ND, dstream_ND = layer_backward(
            weights, saved, place, None, sums, dx_BTD.contiguous().flatten(0, 1), None, ctx.float8
        )
        dx_ND = norm_chain_backward(
            dnormed_ND, dstream_ND, chained.sum_ND,
            rstd_a_N=None, gain_a_D=None,
            rstd_b_N=chained.rstd_b_N, gain_b_D=weights.norm_1,
            dgain_b_D=sums.vector(weights.norm_1),
        )  # fmt: skip
        ctx.float8 = None
        return (
            None,
            None,
            None,
            None,
            dx_ND.view_as(dx_BTD),
            *(sums.take(weight) for weight in weights),
        )


def taken_once(saved: Any) -> Any:
    """What a forward pass has kept; a RuntimeError if its backward pass has already run."""
    if saved is None:
        raise RuntimeError(
            "the fused backward pass runs once: it frees and overwrites what the forward pass "
            "kept. Call the model again, or take model.path=reference."
        )
    return saved
