"""What follows the model: its loss, and the optimizers."""

# N tokens  D width  V vocabulary

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from micro_ops.case import (
    Case,
    Inputs,
    Outputs,
    Prepare,
    Run,
    Sizes,
    compiled,
    forward_of,
    normal,
    with_liger,
)
from pretrain_kernels.adamw import adamw_
from pretrain_kernels.adamw import reference as plain_adamw
from pretrain_kernels.add_gradient import add_gradient
from pretrain_kernels.add_gradient import reference as plain_adding
from pretrain_kernels.ellis_adam import reference as plain_ellis_adam
from pretrain_kernels.ellis_adam import update_moments, update_weights
from pretrain_kernels.linear_cross_entropy import linear_cross_entropy, reference, softmax_for
from pretrain_kernels.spans import Piece, Spans
from pretrain_kernels.square_sums import reference as plain_squares
from pretrain_kernels.square_sums import square_sums

# A partition of the large model holds about ninety tensors.
NUM_TENSORS = 90
ELLIS = {"beta1": 0.9, "beta2": 0.95, "floor": 1e-6}
ADAMW = {
    "rate": 3e-3, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1, "step": 3
}  # fmt: skip


def cases(sizes: Sizes) -> Iterator[Case]:
    """The loss in bfloat16, the optimizers in float32."""
    yield from _softmax_cases(sizes)
    yield from _optimizer_cases(sizes)
    for tokens in (sizes.tokens, 2 * sizes.tokens):
        yield _loss_case(sizes, tokens)
    yield from _gradient_cases(sizes)


def _logits(vocabulary: int, tokens: int, device: torch.device) -> Inputs:
    logits_NV = 2 * normal(tokens, vocabulary, device=device)
    labels_N = torch.randint(vocabulary, (tokens,), device=device)
    return {
        "logits": logits_NV,
        "labels": labels_N,
        "lse": logits_NV.float().logsumexp(1),
        "upstream": torch.full((tokens,), 1 / tokens, device=device),
    }


def _softmax_cases(sizes: Sizes) -> Iterator[Case]:
    def nats(module, inputs: Inputs) -> Outputs:
        return tuple(module.nats_and_lse(inputs["logits"], inputs["labels"], z_loss=1e-4))

    def gradient(module, inputs: Inputs) -> Outputs:
        arguments = [inputs[name] for name in ("logits", "labels", "lse", "upstream")]
        module.logits_to_gradient_(*arguments, z_loss=1e-4)
        return (inputs["logits"],)

    for op, function, bytes_per_logit in (
        ("cross_entropy nats", nats, 2), ("cross_entropy gradient", gradient, 4)
    ):  # fmt: skip
        plain = partial(function, reference)
        yield Case(
            op=op, shape=f"{sizes.tokens}x{sizes.vocabulary}", dtype=torch.bfloat16,
            size=sizes.tokens, amount=bytes_per_logit * sizes.tokens * sizes.vocabulary,
            limit="copy", make=partial(_logits, sizes.vocabulary),
            providers={
                "ours": forward_of(
                    lambda i, function=function: function(softmax_for(i["logits"]), i)
                ),
                "eager": forward_of(plain),
                "torch.compile": forward_of(compiled(plain)),
            },
        )  # fmt: skip


def _loss_inputs(sizes: Sizes, tokens: int, device: torch.device) -> Inputs:
    return {
        "hidden": normal(tokens, sizes.width, device=device),
        "weight": normal(sizes.vocabulary, sizes.width, device=device) / sizes.width**0.5,
        "labels": torch.randint(sizes.vocabulary, (tokens,), device=device),
    }


def _plain_mean(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    logits_NV = F.linear(hidden_ND, weight_VD)
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    return F.cross_entropy(logits_NV.to(wide), labels_N)


def _our_mean(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    return linear_cross_entropy(hidden_ND, weight_VD, labels_N).mean()


def _both_ways(mean) -> Prepare:
    """Forward and backward in one call: the gradients of hidden and weight."""

    def prepare(inputs: Inputs) -> Run:
        leaves = [inputs[name].detach().requires_grad_() for name in ("hidden", "weight")]
        return lambda: torch.autograd.grad(mean(*leaves, inputs["labels"]), leaves)

    return prepare


def _liger_loss() -> Prepare:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def mean(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
        result = LigerFusedLinearCrossEntropyFunction.apply(hidden_ND, weight_VD, labels_N)
        return result[0] if isinstance(result, tuple) else result

    return _both_ways(mean)


def _loss_case(sizes: Sizes, tokens: int) -> Case:
    providers = {
        "ours": _both_ways(_our_mean),
        "eager": _both_ways(_plain_mean),
        "torch.compile": _both_ways(compiled(_plain_mean)),
    }
    return Case(
        op="linear_cross_entropy both ways", dtype=torch.bfloat16, size=tokens,
        shape=f"{tokens}x{sizes.width}x{sizes.vocabulary}",
        # three products; logits that are computed again count as time, not as work
        amount=6.0 * tokens * sizes.width * sizes.vocabulary, limit="gemm",
        make=partial(_loss_inputs, sizes), providers=with_liger(providers, _liger_loss),
    )  # fmt: skip


def _state(elements: int, device: torch.device) -> Inputs:
    names = ("weight", "gradient", "mean", "square")
    inputs = {name: normal(elements, device=device, dtype=torch.float32) for name in names}
    inputs["square"].square_()
    return inputs


def _spans(inputs: Inputs) -> Spans:
    """Tensors of one odd length, one after the other."""
    numel = (inputs["weight"].numel() // NUM_TENSORS - 1) | 1
    pieces = [Piece(tensor, tensor * numel, numel) for tensor in range(NUM_TENSORS)]
    return Spans(pieces, NUM_TENSORS, inputs["weight"].device)


def _ellis_adam(moments, weights, inputs: Inputs) -> Run:
    """With a tensor for rounded weights, those too, and the gradient is clipped."""
    spans = _spans(inputs)
    means = [inputs["mean"], inputs["square"]]
    numel = spans.pieces[0].numel
    rounded = inputs.get("rounded")
    factor = 1.0 if rounded is None else 0.7

    def run() -> Outputs:
        sums = moments(inputs["gradient"], *means, spans, is_start=False, factor=factor, **ELLIS)
        etas = (3e-3 / (sums / numel).sqrt().clamp(min=1.0)).to(torch.float32)
        weights(inputs["weight"], *means, etas, spans, keep=0.9999, correction=1.5, rounded=rounded)
        return inputs["weight"], *means, *([] if rounded is None else [rounded])

    return run


def _state_and_rounded(elements: int, device: torch.device) -> Inputs:
    inputs = _state(elements, device)
    return inputs | {"rounded": inputs["weight"].to(torch.bfloat16)}


def _gradient(elements: int, device: torch.device) -> Inputs:
    inputs = {"total": normal(elements, device=device, dtype=torch.float32)}
    return inputs | {"gradient": normal(elements, device=device)}


def _adding(function, is_first: bool, inputs: Inputs) -> Run:
    def run() -> Outputs:
        function(inputs["total"], inputs["gradient"], is_first=is_first)
        return (inputs["total"],)

    return run


def _squares(function, inputs: Inputs) -> Run:
    spans = _spans(inputs)
    return lambda: (function(inputs["gradient"], spans),)


def _gradient_cases(sizes: Sizes) -> Iterator[Case]:
    """What happens to a gradient after the backward pass, and an update that clips and rounds."""
    elements = sizes.elements
    fields = {"size": elements, "check_size": min(elements, 1 << 22), "limit": "copy"}
    for op, is_first, bytes_per_element in (
        ("add_gradient first", True, 6), ("add_gradient", False, 10)
    ):  # fmt: skip
        yield Case(
            op=op, shape=f"{elements}", dtype=torch.bfloat16, make=_gradient,
            amount=float(bytes_per_element * elements), **fields,
            providers={
                "ours": partial(_adding, add_gradient, is_first),
                "eager": partial(_adding, plain_adding.add_gradient, is_first),
            },
        )  # fmt: skip
    yield Case(
        op="square_sums", shape=f"{elements} in {NUM_TENSORS} tensors", dtype=torch.float32,
        make=_state, amount=4.0 * elements, **fields,
        providers={
            "ours": partial(_squares, square_sums),
            "eager": partial(_squares, plain_squares.square_sums),
        },
    )  # fmt: skip
    yield Case(
        op="ellis_adam clipped and rounded", shape=f"{elements} in {NUM_TENSORS} tensors",
        dtype=torch.float32, make=_state_and_rounded, amount=38.0 * elements, **fields,
        providers={
            "ours": partial(_ellis_adam, update_moments, update_weights),
            "eager": partial(
                _ellis_adam, plain_ellis_adam.update_moments, plain_ellis_adam.update_weights
            ),
        },
    )  # fmt: skip


def _adamw(function, inputs: Inputs) -> Run:
    spans = _spans(inputs)
    tensors = [inputs[name] for name in ("weight", "gradient", "mean", "square")]

    def run() -> Outputs:
        sums = function(*tensors, spans, **ADAMW)
        return tensors[0], tensors[2], tensors[3], sums

    return run


def _torch_adamw(inputs: Inputs) -> Run:
    """torch's fused AdamW, a tensor each, and the same sums of squares beside it."""
    spans = _spans(inputs)
    views = [
        [inputs[name].narrow(0, piece.start, piece.numel) for piece in spans.pieces]
        for name in ("weight", "gradient", "mean", "square")
    ]
    parameters = [torch.nn.Parameter(view) for view in views[0]]
    device = inputs["weight"].device
    optimizer = torch.optim.AdamW(
        parameters, lr=ADAMW["rate"], betas=(ADAMW["beta1"], ADAMW["beta2"]),
        eps=ADAMW["epsilon"], weight_decay=ADAMW["weight_decay"], fused=True,
        capturable=device.type == "cuda",
    )  # fmt: skip
    for parameter, gradient, mean, square in zip(parameters, *views[1:], strict=True):
        parameter.grad = gradient
        before = torch.tensor(ADAMW["step"] - 1.0, device=device)
        optimizer.state[parameter] = {"step": before, "exp_avg": mean, "exp_avg_sq": square}

    def run() -> Outputs:
        optimizer.step()
        norms = torch.stack(torch._foreach_norm(views[1]))
        return inputs["weight"], inputs["mean"], inputs["square"], norms.square()

    return run


def _optimizer_cases(sizes: Sizes) -> Iterator[Case]:
    fields = {
        "shape": f"{sizes.elements} in {NUM_TENSORS} tensors", "dtype": torch.float32,
        "size": sizes.elements, "check_size": min(sizes.elements, 1 << 22), "limit": "copy",
        "make": _state,
    }  # fmt: skip
    plain = plain_ellis_adam
    yield Case(
        op="ellis_adam", amount=36.0 * sizes.elements, **fields,
        providers={
            "ours": partial(_ellis_adam, update_moments, update_weights),
            "eager": partial(_ellis_adam, plain.update_moments, plain.update_weights),
        },
    )  # fmt: skip
    yield Case(
        op="adamw with norms", amount=28.0 * sizes.elements, **fields,
        providers={
            "ours": partial(_adamw, adamw_),
            "eager": partial(_adamw, plain_adamw.adamw_),
            "torch fused": _torch_adamw,
        },
    )  # fmt: skip
