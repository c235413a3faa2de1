"""What a model costs: parameters and FLOPs, exactly, and what autograd keeps, nearly.

FLOPs are those of the mathematics as written: a multiply-add is 2, causal attention counts the
(T + 1) / 2 keys that a query may see on average, a backward pass costs two forward passes.
Elementwise work is not counted.
"""

from dataclasses import dataclass

import numpy as np

from pretrain.model.config import CHUNK_TOKENS, DepthConfig, ModelConfig
from pretrain.model.depth import Depth, DepthLaw

# Statistics, attention's log-sum-exp, loss: kept in float32 whatever the weights are.
_WIDE_BYTES = 4


def layer_weights(model: ModelConfig) -> int:
    """Weights of one layer that multiply activations: queries, keys, values, output, MLP."""
    return 4 * model.width**2 + 3 * model.inner * model.width


def layer_parameters(model: ModelConfig) -> int:
    """All parameters of one layer: its weights, the q and k bias, four norm gains."""
    return layer_weights(model) + 2 * model.width + 4 * model.width


def count_parameters(model: ModelConfig) -> dict[str, int]:
    """Parameters by part of the model; embedding and head are one tied matrix."""
    layer = layer_parameters(model)
    return {
        "embedding": model.vocabulary_size * model.width,
        "prelude": model.prelude_layers * layer,
        "adapter": 2 * model.width**2,
        "core": model.core_layers * layer,
        "coda": model.coda_layers * layer,
        "final norm": model.width,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenFlops:
    """Forward FLOPs of one token, from which every other count follows."""

    once: int
    """Prelude, coda and head."""
    iteration: int
    """Adapter and core, once."""

    @staticmethod
    def of(model: ModelConfig) -> "TokenFlops":
        """The counts of one model at its full context."""
        # scores and mixture: 2 products of D multiply-adds with (T + 1) / 2 keys
        attention = 2 * model.width * (model.context + 1)
        layer = 2 * layer_weights(model) + attention
        head = 2 * model.vocabulary_size * model.width
        return TokenFlops(
            once=(model.prelude_layers + model.coda_layers) * layer + head,
            iteration=model.core_layers * layer + 2 * (2 * model.width**2),
        )

    def model(self, no_grad: float, with_grad: float) -> float:
        """Training FLOPs of the mathematics: no recomputation."""
        return 3 * self.once + self.iteration * (no_grad + 3 * with_grad)

    def executed(self, no_grad: float, with_grad: float, *, is_recomputed: bool) -> float:
        """Training FLOPs that run, with the recomputation of activation checkpoints if any."""
        passes = 4 if is_recomputed else 3
        return 3 * self.once + self.iteration * (no_grad + passes * with_grad)


def mean_iterations(depth: DepthConfig) -> tuple[float, float]:
    """Iterations without and with gradient, averaged over the law."""
    law = DepthLaw.of(depth)
    with_grad = np.minimum(law.depths, depth.backprop).astype(np.float64)
    no_grad = law.depths - with_grad
    return law.expect(no_grad), law.expect(with_grad)


def layer_activation_bytes(model: ModelConfig, *, element_bytes: int) -> int:
    """Bytes per token that autograd keeps of one layer on the plain PyTorch path.

    Four norms keep their float32 input, its scale and their normalised output; matrices their
    inputs; attention keeps rotated q and k, the packed qkv that v is a view of, and its output,
    which is also an input already counted for; the MLP keeps gate|up, SiLU(gate), their product.
    """
    norms = 4 * _norm_bytes(model, element_bytes)
    matrix_inputs = 2 * element_bytes * model.width
    attention = 6 * element_bytes * model.width + _WIDE_BYTES * model.heads
    mlp = 4 * element_bytes * model.inner
    return norms + matrix_inputs + attention + mlp


def _norm_bytes(model: ModelConfig, element_bytes: int) -> int:
    return (_WIDE_BYTES + element_bytes) * model.width + _WIDE_BYTES


def row_activation_bytes(
    model: ModelConfig, backprop: int, *, element_bytes: int, is_checkpointed: bool
) -> int:
    """Bytes kept for the backward pass of one row with `backprop` iterations of gradient.

    Without the head. Checkpointed: the state per iteration, and one iteration while it is redone.
    """
    layer = layer_activation_bytes(model, element_bytes=element_bytes)
    state = element_bytes * model.width
    joined = 2 * state
    iteration = model.core_layers * layer + joined
    kept = backprop * state + iteration if is_checkpointed else backprop * iteration
    once = (model.prelude_layers + model.coda_layers) * layer + 2 * state
    once += 2 * _norm_bytes(model, element_bytes)
    return model.context * (kept + once)


def head_bytes(model: ModelConfig, *, rows: int, element_bytes: int) -> int:
    """Logits of one chunk at their peak: log-probabilities, their gradient, and its cast."""
    tokens = min(rows * model.context, CHUNK_TOKENS)
    return tokens * model.vocabulary_size * (2 * _WIDE_BYTES + element_bytes)


def model_flops_per_token(model: ModelConfig, depth: Depth) -> float:
    """Training FLOPs per token of a row with this depth, without recomputation."""
    return TokenFlops.of(model).model(depth.no_grad, depth.with_grad)
