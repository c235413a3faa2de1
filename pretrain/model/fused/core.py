"""The fused recurrence in autograd: a loop, and a step for each part of its first iteration.

Going forward all is done in the loop. Going back, the loop is undone down to the first iteration
with gradient; of that, each layer is a step of autograd, because it is the layer's last use: its
gradients are whole, and an engine may reduce them while the layers before it are undone.
"""

# B rows  T tokens  D width

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pretrain.model.fused.block import taken_once
from pretrain.model.fused.recurrence import Recurrence
from pretrain.model.fused.unwinding import Unwinding


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
    steps, weights = _Steps(recurrence), recurrence.weights
    token: Tensor = _Injection.apply(steps, embedded_BTD, parameters[0], weights[0].norm_1)
    for index in range(len(weights)):
        token = _Layer.apply(steps, index, token, *recurrence.finished_with(index))
    state_BTD: Tensor = _Loop.apply(steps, token, embedded_BTD, start_BTD)
    return state_BTD


@dataclass
class _Steps:
    """What the steps share. Tokens, which are nothing else, say which comes after which."""

    recurrence: Recurrence
    unwinding: Unwinding | None = None
    """From the end of the loop's backward pass to that of the injection's."""


class _Loop(Function):
    """All iterations; backward, all but the first one with gradient."""

    @staticmethod
    def forward(
        ctx: Any, steps: _Steps, token: Tensor, embedded_BTD: Tensor, start_BTD: Tensor
    ) -> Tensor:
        ctx.steps = steps
        # the start, too, is a state to differentiate at: autograd notices if somebody writes there
        ctx.save_for_backward(embedded_BTD, start_BTD)
        return steps.recurrence.run(embedded_BTD, start_BTD, keeps=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstate_BTD: Tensor) -> tuple[Tensor | None, ...]:
        steps: _Steps = taken_once(ctx.steps)
        ctx.steps = None
        embedded_BTD, _ = ctx.saved_tensors
        steps.unwinding = Unwinding(steps.recurrence, embedded_BTD, dstate_BTD.contiguous())
        steps.unwinding.to_first_iteration()
        return None, dstate_BTD.new_zeros(()), None, None


class _Layer(Function):
    """Backward, a layer of the first iteration with gradient.

    The parameters are arguments so that autograd asks for their gradients, once each.
    """

    @staticmethod
    def forward(ctx: Any, steps: _Steps, index: int, token: Tensor, *finished: Tensor) -> Tensor:
        ctx.steps, ctx.index = steps, index
        return token.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtoken: Tensor) -> tuple[Tensor | None, ...]:
        recurrence, unwinding = ctx.steps.recurrence, ctx.steps.unwinding
        unwinding.layer(ctx.index)
        finished = recurrence.finished_with(ctx.index)
        return None, None, dtoken, *(unwinding.sums.take(tensor) for tensor in finished)


class _Injection(Function):
    """Backward, what is left of that iteration: A_s s + A_e e and its norm."""

    @staticmethod
    def forward(ctx: Any, steps: _Steps, embedded_BTD: Tensor, *finished: Tensor) -> Tensor:
        ctx.steps = steps
        return embedded_BTD.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtoken: Tensor) -> tuple[Tensor | None, ...]:
        recurrence, unwinding = ctx.steps.recurrence, ctx.steps.unwinding
        ctx.steps.unwinding = None
        dembedded_BTD = unwinding.embedded()
        recurrence.forget()
        finished = (recurrence.iteration.adapter, recurrence.weights[0].norm_1)
        return None, dembedded_BTD, *(unwinding.sums.take(tensor) for tensor in finished)
