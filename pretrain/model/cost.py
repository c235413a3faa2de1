"""What a model costs: parameters and FLOPs, exactly.

FLOPs are those of the mathematics as written: a multiply-add is 2, causal attention counts the
(T + 1) / 2 keys that a query may see on average, a backward pass costs two forward passes.
Elementwise work is not counted.
"""

from dataclasses import dataclass, replace

import numpy as np

from pretrain.model.config import Block, DepthConfig, Injection, ModelConfig
from pretrain.model.depth import DepthLaw, means_of_run, settled


def layer_weights(model: ModelConfig) -> int:
    """Weights of one layer that multiply activations: queries, keys, values, output, MLP."""
    return 4 * model.width**2 + 3 * model.inner * model.width


def layer_parameters(model: ModelConfig) -> int:
    """All parameters of one layer: its weights, the q and k bias, the gains of its norms."""
    gains = layer_norms(model) if model.norm_gain else 0
    return layer_weights(model) + (2 * model.qk_bias + gains) * model.width


def count_parameters(model: ModelConfig) -> dict[str, int]:
    """Parameters by part of the model; embedding and head are one tied matrix."""
    layer = layer_parameters(model)
    places = model.digit_positions
    return {
        "embedding": model.vocabulary_size * model.width,
        **({} if places is None else {"digit places": places * model.width}),
        "prelude": model.prelude_layers * layer,
        "adapter": _adapter_weights(model),
        "core": model.core_layers * layer,
        "coda": model.coda_layers * layer,
        "final norm": model.norm_gain * model.width,
    }


def layer_norms(model: ModelConfig) -> int:
    """Norms of one layer."""
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

    def executed(self, no_grad: float, with_grad: float, *, recomputed: float) -> float:
        """Training FLOPs that run where `recomputed` iterations are computed again.

        A pre-norm core's recomputation ends one matrix product earlier than is counted.
        """
        return self.model(no_grad, with_grad) + self.iteration * recomputed


def mean_iterations(depth: DepthConfig, *, rows: int) -> tuple[float, float]:
    """Iterations without and with gradient, averaged over the law and a run of `rows` rows."""
    no_grad = with_grad = 0.0
    for mean, share in means_of_run(depth, rows):
        law = DepthLaw.of(replace(settled(depth), mean=mean))
        gradient = np.minimum(law.depths, depth.backprop).astype(np.float64)
        with_grad += share * law.expect(gradient)
        no_grad += share * law.expect(law.depths - gradient)
    return no_grad, with_grad


def mean_recomputed(depth: DepthConfig, *, rows: int, kept_iterations: int | None) -> float:
    """Iterations that the backward pass computes again, averaged as in `mean_iterations`.

    The last kept_iterations of a row are not; None: none is.
    """
    if kept_iterations is None or kept_iterations >= depth.backprop:
        return 0.0
    _, with_grad = mean_iterations(depth, rows=rows)
    if kept_iterations == 0:
        return with_grad
    # of a row with k iterations, all but min(k, kept)
    _, kept = mean_iterations(replace(depth, backprop=kept_iterations), rows=rows)
    return with_grad - kept
