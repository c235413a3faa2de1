"""What a model costs: parameters and FLOPs, exactly, and what autograd keeps, nearly.

FLOPs are those of the mathematics as written: a multiply-add is 2, causal attention counts the
(T + 1) / 2 keys that a query may see on average, a backward pass costs two forward passes.
Elementwise work is not counted.
"""

from dataclasses import dataclass, replace

import numpy as np

from pretrain.model.config import CHUNK_TOKENS, Block, DepthConfig, Injection, ModelConfig
from pretrain.model.depth import Depth, DepthLaw, means_of_run, settled

# Statistics, attention's log-sum-exp, loss: kept in float32 whatever the weights are.
_WIDE_BYTES = 4


def layer_weights(model: ModelConfig) -> int:
    """Weights of one layer that multiply activations: queries, keys, values, output, MLP."""
    return 4 * model.width**2 + 3 * model.inner * model.width


def layer_parameters(model: ModelConfig) -> int:
    """All parameters of one layer: its weights, the q and k bias, the gains of its norms."""
    gains = _layer_norms(model) if model.norm_gain else 0
    return layer_weights(model) + (2 * model.qk_bias + gains) * model.width


def count_parameters(model: ModelConfig) -> dict[str, int]:
    """Parameters by part of the model; embedding and head are one tied matrix."""
    layer = layer_parameters(model)
    return {
        "embedding": model.vocabulary_size * model.width,
        "prelude": model.prelude_layers * layer,
        "adapter": _adapter_weights(model),
        "core": model.core_layers * layer,
        "coda": model.coda_layers * layer,
        "final norm": model.norm_gain * model.width,
    }


def _layer_norms(model: ModelConfig) -> int:
    return 4 if model.block is Block.sandwich else 2


def _adapter_weights(model: ModelConfig) -> int:
    return 2 * model.width**2 if model.injection is Injection.linear else 0


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
            iteration=model.core_layers * layer + 2 * _adapter_weights(model),
        )

    def model(self, no_grad: float, with_grad: float) -> float:
        """Training FLOPs of the mathematics: no recomputation."""
        return 3 * self.once + self.iteration * (no_grad + 3 * with_grad)

    def executed(self, no_grad: float, with_grad: float, *, is_recomputed: bool) -> float:
        """Training FLOPs that run, with the recomputation of activation checkpoints if any.

        A pre-norm core's recomputation ends one matrix product earlier than is counted.
        """
        passes = 4 if is_recomputed else 3
        return 3 * self.once + self.iteration * (no_grad + passes * with_grad)


def mean_iterations(depth: DepthConfig, *, rows: int) -> tuple[float, float]:
    """Iterations without and with gradient, averaged over the law and a run of `rows` rows."""
    no_grad = with_grad = 0.0
    for mean, share in means_of_run(depth, rows):
        law = DepthLaw.of(replace(settled(depth), mean=mean))
        gradient = np.minimum(law.depths, depth.backprop).astype(np.float64)
        with_grad += share * law.expect(gradient)
        no_grad += share * law.expect(law.depths - gradient)
    return no_grad, with_grad


def layer_activation_bytes(model: ModelConfig, *, element_bytes: int) -> int:
    """Bytes per token that autograd keeps of one layer on the plain PyTorch path.

    Norms keep their float32 input, its scale and, for a gain, their normalised output; matrices
    their inputs; attention keeps rotated q and k, the packed qkv that v is a view of, and its
    output, which is also an input already counted for; the MLP keeps gate|up, SiLU(gate), their
    product.
    """
    norms = _layer_norms(model) * _norm_bytes(model, element_bytes)
    matrix_inputs = 2 * element_bytes * model.width
    attention = 6 * element_bytes * model.width + _WIDE_BYTES * model.heads
    mlp = 4 * element_bytes * model.inner
    return norms + matrix_inputs + attention + mlp


def _norm_bytes(model: ModelConfig, element_bytes: int) -> int:
    return (_WIDE_BYTES + model.norm_gain * element_bytes) * model.width + _WIDE_BYTES


def row_activation_bytes(
    model: ModelConfig, backprop: int, *, element_bytes: int, is_checkpointed: bool
) -> int:
    """Bytes kept for the backward pass of one row with `backprop` iterations of gradient.

    Without the head. Checkpointed: the state per iteration, and one iteration while it is redone.
    """
    layer = layer_activation_bytes(model, element_bytes=element_bytes)
    state = element_bytes * model.width
    joined = 2 * state if model.injection is Injection.linear else 0
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
