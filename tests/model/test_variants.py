"""Every variant of the model against its equations, written out, in float64, gradients included."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pretrain.model.config import Block, Injection, ModelConfig
from pretrain.model.cost import TokenFlops, count_parameters
from pretrain.model.depth import Depth
from pretrain.model.init import initialize
from pretrain.model.initial_state import initial_states
from pretrain.model.recurrent import RecurrentModel

PUBLISHED = ModelConfig(
    name="small", width=16, heads=2, inner=24, prelude_layers=1, core_layers=2, coda_layers=1,
    vocabulary_size=32, context=16, rope_base=700.0, norm_epsilon=1e-4,
)  # fmt: skip
FAILED_1 = {
    "norm_gain": False,
    "injection": Injection.add,
    "embedding_scale": False,
    "qk_bias": False,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "no gain": {"norm_gain": False},
    "no q and k bias": {"qk_bias": False},
    "pre-norm": {"block": Block.pre_norm},
    "added state": {"injection": Injection.add},
    "unscaled embedding": {"embedding_scale": False},
    "failed run 1": FAILED_1,
    "pre-norm without gain": {"block": Block.pre_norm, "norm_gain": False},
}
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


def make(changes: dict[str, Any]) -> RecurrentModel:
    """A model whose weights all matter: neither branches near zero nor gains of one."""
    model = RecurrentModel(dataclasses.replace(PUBLISHED, **changes)).double()
    initialize(model, mean_depth=4, seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).double())
    return model


class Oracle:
    """The equations of the paper with nothing shared but the weights, by their names."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor]) -> None:
        self.c, self.w = config, weights

    def norm(self, x: Tensor, name: str) -> Tensor:
        y = x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.c.norm_epsilon)
        return y * self.w[f"{name}.gain"] if self.c.norm_gain else y

    def attention(self, x: Tensor, name: str) -> Tensor:
        tokens, width = x.shape[1:]
        size = width // self.c.heads
        angle = torch.outer(
            torch.arange(tokens).double(),
            self.c.rope_base ** (-torch.arange(0, size, 2).double() / size),
        )
        spin = torch.polar(torch.ones_like(angle), angle)
        heads = []
        for head in range(self.c.heads):
            rows = [part * width + head * size for part in range(3)]
            q, k, v = (x @ self.w[f"{name}.qkv"][row : row + size].T for row in rows)
            if self.c.qk_bias:
                bias = self.w[f"{name}.qk_bias"]
                q, k = q + bias[0, 0, head], k + bias[1, 0, head]
            q, k = (
                torch.view_as_real(torch.view_as_complex(z.reshape(*z.shape[:-1], -1, 2)) * spin)
                for z in (q, k)
            )
            scores = torch.einsum("btpc,bspc->bts", q, k) / math.sqrt(size)
            later = torch.ones(tokens, tokens).triu(1).bool()
            heads.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ v)
        return torch.cat(heads, -1) @ self.w[f"{name}.output"].T

    def mlp(self, x: Tensor, name: str) -> Tensor:
        gate, up = (x @ self.w[f"{name}.gate_up"].T).chunk(2, -1)
        return (gate * torch.sigmoid(gate) * up) @ self.w[f"{name}.down"].T

    def layer(self, x: Tensor, name: str) -> Tensor:
        if self.c.block is Block.pre_norm:
            x = x + self.attention(self.norm(x, f"{name}.norm_1"), f"{name}.attention")
            return x + self.mlp(self.norm(x, f"{name}.norm_2"), f"{name}.mlp")
        x = x + self.attention(self.norm(x, f"{name}.norm_1"), f"{name}.attention")
        x = self.norm(x, f"{name}.norm_2")
        x = x + self.mlp(self.norm(x, f"{name}.norm_3"), f"{name}.mlp")
        return self.norm(x, f"{name}.norm_4")

    def layers(self, x: Tensor, part: str, count: int) -> Tensor:
        for index in range(count):
            x = self.layer(x, f"{part}.{index}")
        return x

    def iterate(self, state: Tensor, embedded: Tensor) -> Tensor:
        if self.c.injection is Injection.add:
            x = state + embedded
        else:
            on_state, on_embedded = self.w["core.iteration.adapter"].chunk(2, 1)
            x = state @ on_state.T + embedded @ on_embedded.T
        return self.layers(x, "core.iteration.layers", self.c.core_layers)

    def logits(self, tokens: Tensor, state: Tensor, depth: Depth) -> Tensor:
        scale = math.sqrt(self.c.width) if self.c.embedding_scale else 1.0
        embedded = self.w["embedding.weight"][tokens] * scale
        embedded = self.layers(embedded, "prelude", self.c.prelude_layers)
        for _ in range(depth.no_grad):
            state = self.iterate(state, embedded).detach()
        for _ in range(depth.with_grad):
            state = self.iterate(state, embedded)
        hidden = self.layers(self.norm(state, "final_norm"), "coda", self.c.coda_layers)
        return self.norm(hidden, "final_norm") @ self.w["embedding.weight"].T


@variants
def test_logits_and_gradients_are_those_of_the_equations(changes: dict[str, Any]) -> None:
    model = make(changes)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(32, (2, 7), generator=generator)
    labels = torch.randint(32, (2, 7), generator=generator)
    state = torch.randn(2, 7, 16, generator=generator).double()
    depth = Depth(2, 3)
    found = model(tokens, [depth] * 2, initial_state=state, labels=labels)
    found.nats.backward()
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    logits = Oracle(model.config, weights).logits(tokens, state, depth)
    cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    # Rotary angles are float32 in the model (6e-8 of an angle below 7); all else is float64.
    torch.testing.assert_close(found.logits, logits, atol=1e-5, rtol=0)
    for name, parameter in model.named_parameters():
        expected = weights[name].grad
        assert expected is not None
        assert parameter.grad is not None
        assert expected.abs().max() > 1e-3, f"{name} does not matter"
        error = (parameter.grad - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, name


@variants
def test_parameters_are_counted_for_every_variant(changes: dict[str, Any]) -> None:
    model = make(changes)
    found = count_parameters(model.config)
    assert sum(p.numel() for p in model.parameters()) == sum(found.values())
    layers = model.core.iteration.layers
    assert sum(p.numel() for p in layers.parameters()) == found["core"]
    assert sum(p.numel() for p in model.final_norm.parameters()) == found["final norm"]


def test_the_failed_runs_have_the_parameters_of_their_names() -> None:
    """The first: 33 gains, 8 pairs of q and k biases and the adapter less. The second: 16 gains."""
    huginn = dataclasses.replace(
        PUBLISHED, width=5280, heads=55, inner=17920, prelude_layers=2, core_layers=4,
        coda_layers=2, vocabulary_size=65536, context=4096,
    )  # fmt: skip
    whole = sum(count_parameters(huginn).values())
    first = sum(count_parameters(dataclasses.replace(huginn, **FAILED_1)).values())
    assert whole - first == 33 * 5280 + 8 * 10_560 + 2 * 5280**2
    second = dataclasses.replace(huginn, block=Block.pre_norm)
    assert whole - sum(count_parameters(second).values()) == 8 * 2 * 5280


def test_an_added_state_saves_the_flops_of_the_adapter() -> None:
    added = dataclasses.replace(PUBLISHED, injection=Injection.add)
    saved = TokenFlops.of(PUBLISHED).iteration - TokenFlops.of(added).iteration
    assert saved == 2 * (2 * 16 * 16)
    assert TokenFlops.of(PUBLISHED).once == TokenFlops.of(added).once


def test_the_initial_state_is_scaled_as_the_embedding_is() -> None:
    unscaled = dataclasses.replace(PUBLISHED, embedding_scale=False)
    assert PUBLISHED.state_sigma == math.sqrt(2 / 5)
    assert unscaled.state_sigma == math.sqrt(2 / (5 * 16))
    states = [
        initial_states([3], seed=1, context=8, width=16, sigma=config.state_sigma)
        for config in (PUBLISHED, unscaled)
    ]
    # the same draws, so only the rounding of two products to float32 is left
    torch.testing.assert_close(states[0], 4.0 * states[1], rtol=3e-7, atol=0)


@variants
def test_weights_of_every_variant_begin_with_the_same_sigmas(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(PUBLISHED, width=64, **changes)
    model, published = RecurrentModel(config), dataclasses.replace(PUBLISHED, width=64)
    initialize(model, mean_depth=4, seed=0)
    whole = RecurrentModel(published)
    initialize(whole, mean_depth=4, seed=0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            assert torch.equal(parameter, whole.get_parameter(name)), name
        elif name.endswith("gain"):
            assert (parameter == 1).all(), name
