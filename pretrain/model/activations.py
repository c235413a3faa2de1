"""Bytes that a micro-step keeps for its backward pass, on the plain and on the fused path.

Layers, iterations and rows are counted tensor by tensor; the fullest moment of a backward pass on
the fused path is within 3 % of what GPUs measured (tests/engine/test_memory.py). Compiled layers
are counted as plain ones, which is too much: 64 GB where 45 were measured, one row of huginn-3.5b.
"""

# D width  I inner width  H heads

from pretrain.model.config import (
    CHUNK_TOKENS,
    FUSED_CHUNK_TOKENS,
    ComputePath,
    Injection,
    ModelConfig,
    ProductPrecision,
)
from pretrain.model.cost import count_parameters, layer_norms, layer_weights

# Statistics, attention's log-sum-exp, loss: kept in float32 whatever the weights are.
_WIDE_BYTES = 4
# RMSNorms of a fused layer: each keeps one number a token.
_FUSED_NORMS = 4


def layer_activation_bytes(model: ModelConfig, *, element_bytes: int) -> int:
    """Bytes per token that are kept of one layer.

    Plain: norms keep their float32 input, its scale and, for a gain, their normalised output;
    matrices their inputs; attention keeps rotated q and k, the packed qkv that v is a view of, and
    its output, which is also an input already counted for; the MLP keeps gate|up, SiLU(gate), their
    product. Fused: see `_fused_layer_bytes`.
    """
    if model.path is ComputePath.fused:
        return _fused_layer_bytes(model, element_bytes)
    norms = layer_norms(model) * _norm_bytes(model, element_bytes)
    matrix_inputs = 2 * element_bytes * model.width
    attention = 6 * element_bytes * model.width + _WIDE_BYTES * model.heads
    mlp = 4 * element_bytes * model.inner
    return norms + matrix_inputs + attention + mlp


def _fused_layer_bytes(model: ModelConfig, element_bytes: int) -> int:
    """qkv 3 D, attention's output D, two sums D each, gate|up 2 I, two normed vectors D each.

    The normed vectors are the inputs of products: in float8 they are bytes, with a scale each.
    """
    normed = element_bytes * model.width
    if model.grad_precision is ProductPrecision.fp8:
        normed = model.width + _WIDE_BYTES
    statistics = _WIDE_BYTES * (model.heads + _FUSED_NORMS)
    return element_bytes * (6 * model.width + 2 * model.inner) + 2 * normed + statistics


def _norm_bytes(model: ModelConfig, element_bytes: int) -> int:
    return (_WIDE_BYTES + model.norm_gain * element_bytes) * model.width + _WIDE_BYTES


def row_activation_bytes(
    model: ModelConfig, backprop: int, *, element_bytes: int, kept_iterations: int | None
) -> int:
    """Bytes kept for the backward pass of one row with `backprop` iterations of gradient.

    Without the head. The last kept_iterations (None: all) are kept whole, of the others the state.
    Those are computed again one by one, once the kept ones are gone: so one is always counted.
    """
    is_fused = model.path is ComputePath.fused
    state = element_bytes * model.width
    kept = backprop if kept_iterations is None else min(kept_iterations, backprop)
    states = backprop if is_fused else backprop - kept
    iterations = max(kept, 1) * _iteration_bytes(model, element_bytes) + states * state
    ends = (model.prelude_layers + model.coda_layers) * _end_layer_bytes(model, element_bytes)
    if is_fused:
        # embedded tokens, A_e e, the last state, the coda's output and its norm; two norms' scales
        once = 5 * state + 2 * _WIDE_BYTES
    else:
        # embedded tokens; what the two norms of the last state and of the coda's output keep
        once = 2 * state + 2 * _norm_bytes(model, element_bytes)
    return model.context * (iterations + ends + once)


def _iteration_bytes(model: ModelConfig, element_bytes: int) -> int:
    """Per token: the layers, and what the adapter is given (plain) or gives (fused)."""
    layers = model.core_layers * layer_activation_bytes(model, element_bytes=element_bytes)
    joined = 2 if model.injection is Injection.linear else 0
    if model.path is ComputePath.fused:
        joined = 1
    return layers + joined * element_bytes * model.width


def _end_layer_bytes(model: ModelConfig, element_bytes: int) -> int:
    """Per token, of a layer of prelude or coda; a fused one's input is no other layer's sum."""
    given = element_bytes * model.width if model.path is ComputePath.fused else 0
    return layer_activation_bytes(model, element_bytes=element_bytes) + given


def head_bytes(model: ModelConfig, *, rows: int, element_bytes: int) -> int:
    """Of one chunk of tokens at its peak, and fused of the gradient of the weight.

    Plain: log-probabilities, their gradient, and its cast. Fused: the logits, which their gradient
    overwrites; over several chunks the weight's is summed in float32 and then rounded.
    """
    tokens = rows * model.context
    if model.path is not ComputePath.fused:
        chunk = min(tokens, CHUNK_TOKENS)
        return chunk * model.vocabulary_size * (2 * _WIDE_BYTES + element_bytes)
    sums = _WIDE_BYTES if tokens > FUSED_CHUNK_TOKENS else 0
    weight = model.vocabulary_size * model.width * (sums + element_bytes)
    return min(tokens, FUSED_CHUNK_TOKENS) * model.vocabulary_size * element_bytes + weight


def peak_activation_bytes(
    model: ModelConfig,
    backprop: int,
    *,
    rows: int,
    element_bytes: int,
    kept_iterations: int | None,
    keeps_float8: bool = False,
) -> int:
    """Bytes of a micro-step of `rows` rows at its fullest moment.

    Plain: when the head is differentiated. Fused: then, or when the core's first iteration is
    differentiated but for its first layer: sums of weight gradients in float32 then stand beside
    all earlier iterations; or when a later one has been computed again beside them. With
    keeps_float8 all float8 copies of weights are there at every moment (`fixed_weights`).
    """
    row = row_activation_bytes(
        model, backprop, element_bytes=element_bytes, kept_iterations=kept_iterations
    )
    at_head = rows * row + head_bytes(model, rows=rows, element_bytes=element_bytes)
    if model.path is not ComputePath.fused:
        return at_head
    layer = layer_activation_bytes(model, element_bytes=element_bytes)
    iteration = _iteration_bytes(model, element_bytes)
    gone = model.coda_layers * _end_layer_bytes(model, element_bytes)
    is_recomputed_later = kept_iterations is not None and kept_iterations <= 1 < backprop
    if not is_recomputed_later:
        gone += iteration - layer
    # of one layer: residual stream, queries, keys and values, apart and packed; A_e e in float32
    passing = (10 * element_bytes + _WIDE_BYTES) * model.width
    counts = count_parameters(model)
    # one iteration needs no wide sum
    wide = _WIDE_BYTES if backprop > 1 else element_bytes
    in_core = rows * (row + model.context * (passing - gone))
    in_core += wide * (counts["core"] + counts["adapter"])
    return max(
        at_head + float8_bytes(model, has_coda=True, is_kept=keeps_float8),
        in_core + float8_bytes(model, has_coda=keeps_float8, is_kept=keeps_float8),
    )


def float8_bytes(model: ModelConfig, *, has_coda: bool, is_kept: bool = False) -> int:
    """Copies of weights after a forward pass: those that its backward pass needs, or all if kept.

    Bytes as the weights are, with a scale for every output, and transposed, with one for every
    input. Of iterations without gradient alone, only the former and only of the core; unless
    kept, they are gone before anything is differentiated.
    """
    by_output = layer_weights(model) + _WIDE_BYTES * (5 * model.width + 2 * model.inner)
    by_input = layer_weights(model) + _WIDE_BYTES * (3 * model.width + model.inner)
    if model.grad_precision is ProductPrecision.fp8:
        layers = model.prelude_layers + model.core_layers + has_coda * model.coda_layers
        return layers * (by_output + by_input)
    is_prefix_kept = is_kept and model.no_grad_precision is ProductPrecision.fp8
    return model.core_layers * by_output if is_prefix_kept else 0
