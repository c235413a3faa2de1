"""Counts against the published numbers and torch's own counter."""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from model_forms import HUGINN, SMALL, forms
from pretrain.model.config import Block, DepthConfig, Law
from pretrain.model.cost import (
    TokenFlops,
    count_parameters,
    layer_parameters,
    mean_iterations,
    mean_recomputed,
)
from pretrain.model.depth import Depth, DepthLaw, settled
from pretrain.model.init import initialize
from pretrain.model.recurrent import RecurrentModel

LAW = DepthConfig(law=Law.poisson_lognormal, mean=32, backprop=8)


def test_parameters_of_huginn_are_the_published_ones():
    counts = count_parameters(HUGINN)
    assert counts == {
        "embedding": 346_030_080,
        "prelude": 790_796_160,
        "adapter": 55_756_800,
        "core": 1_581_592_320,
        "coda": 790_796_160,
        "final norm": 5_280,
    }
    assert sum(counts.values()) == 3_564_976_800
    assert layer_parameters(HUGINN) == 395_398_080


@pytest.mark.parametrize("config", [HUGINN, SMALL], ids=lambda config: config.name)
def test_parameters_are_those_of_the_real_model(config):
    with torch.device("meta"):
        model = RecurrentModel(config)
    counted = count_parameters(config)
    assert sum(p.numel() for p in model.parameters()) == sum(counted.values())
    core = sum(p.numel() for p in model.core.parameters())
    assert core == counted["core"] + counted["adapter"]


def test_flops_of_huginn_are_the_closed_form():
    """12.08 + 3.4475 (n + 3 k) GFLOP per token; 177.6 at (24, 8), 180.9 over the law."""
    flops = TokenFlops.of(HUGINN)
    assert 3 * flops.once / 1e9 == pytest.approx(12.08, abs=0.005)
    assert flops.iteration / 1e9 == pytest.approx(3.4475, abs=0.00005)
    assert flops.model(24, 8) / 1e9 == pytest.approx(177.6, abs=0.05)
    no_grad, with_grad = mean_iterations(LAW, rows=1)
    assert no_grad + with_grad == pytest.approx(33, abs=1e-9)
    assert (no_grad, with_grad) == (pytest.approx(25.02, abs=5e-3), pytest.approx(7.98, abs=5e-3))
    assert flops.model(no_grad, with_grad) / 1e9 == pytest.approx(180.89, abs=0.005)
    # one more forward pass of the core in each iteration with gradient
    assert flops.executed(24, 8, recomputed=8) - flops.model(24, 8) == 8 * flops.iteration
    assert flops.executed(24, 8, recomputed=0) == flops.model(24, 8)


@pytest.mark.parametrize("kept", [None, 0, 1, 3, 8, 9])
def test_recomputed_iterations_are_those_with_gradient_that_are_not_kept(kept):
    """Against the law's probabilities; a row of depth below 8 has fewer."""
    law = DepthLaw.of(settled(LAW))
    with_grad = np.minimum(law.depths, 8)
    expected = 0 if kept is None else law.expect(np.maximum(with_grad - kept, 0.0))
    found = mean_recomputed(LAW, rows=1, kept_iterations=kept)
    assert found == pytest.approx(expected, abs=1e-9)
    assert (found > 0) == (kept in (0, 1, 3))


class FlopCounter(TorchDispatchMode):
    """torch's formula for every operation; its own counter also follows modules, and fails on
    inputs that were sliced without gradient."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


@pytest.mark.parametrize("kept", [None, 0, 1])
@forms
def test_flops_are_what_torch_counts(form, kept):
    """Exactly, once full attention is put where causal attention was counted.

    The mathematical kernel multiplies with all T keys; T (T + 1) / 2 of the T^2 pairs are seen.
    """
    model = RecurrentModel(form)
    initialize(model, mean_depth=4, seed=0)
    model.kept_iterations = kept
    tokens = torch.randint(0, SMALL.vocabulary_size, (1, SMALL.context))
    state = torch.randn(1, SMALL.context, SMALL.width)
    with FlopCounter() as counter, sdpa_kernel(SDPBackend.MATH):
        output = model(tokens, [Depth(3, 2)], initial_state=state, labels=tokens)
        output.nats.backward()
    whole = 4 * SMALL.width * SMALL.context - 2 * SMALL.width * (SMALL.context + 1)
    flops = TokenFlops.of(form)
    full = TokenFlops(
        once=flops.once + (SMALL.prelude_layers + SMALL.coda_layers) * whole,
        iteration=flops.iteration + SMALL.core_layers * whole,
    )
    recomputed = 0 if kept is None else 2 - kept
    expected = SMALL.context * full.executed(3, 2, recomputed=recomputed)
    if form.block is Block.pre_norm:
        # recomputing stops at what the backward pass needs: without a last norm, one product less
        expected -= recomputed / 2 * SMALL.context * 2 * (2 * SMALL.inner * SMALL.width)
    assert counter.total == expected
