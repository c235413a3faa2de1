"""Counts against the published numbers, torch's own counter, and what autograd really keeps."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pretrain.model.block import make_block
from pretrain.model.config import Block, DepthConfig, Injection, Law, ModelConfig
from pretrain.model.cost import (
    TokenFlops,
    count_parameters,
    head_bytes,
    layer_activation_bytes,
    layer_parameters,
    mean_iterations,
    model_flops_per_token,
    row_activation_bytes,
)
from pretrain.model.depth import Depth
from pretrain.model.init import initialize
from pretrain.model.layout import Layout, Mask
from pretrain.model.recurrent import RecurrentModel

HUGINN = ModelConfig(
    name="huginn-3.5b",
    width=5280,
    heads=55,
    inner=17920,
    prelude_layers=2,
    core_layers=4,
    coda_layers=2,
    vocabulary_size=65536,
    context=4096,
)
SMALL = ModelConfig(
    name="small",
    width=64,
    heads=4,
    inner=96,
    prelude_layers=1,
    core_layers=2,
    coda_layers=1,
    vocabulary_size=128,
    context=32,
)
FORMS = {
    "published": SMALL,
    "failed run 1": dataclasses.replace(
        SMALL, norm_gain=False, injection=Injection.add, embedding_scale=False, qk_bias=False
    ),
    "failed run 2": dataclasses.replace(SMALL, block=Block.pre_norm),
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
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
    assert model_flops_per_token(HUGINN, Depth(24, 8)) == flops.model(24, 8)
    no_grad, with_grad = mean_iterations(LAW, rows=1)
    assert no_grad + with_grad == pytest.approx(33, abs=1e-9)
    assert (no_grad, with_grad) == (pytest.approx(25.02, abs=5e-3), pytest.approx(7.98, abs=5e-3))
    assert flops.model(no_grad, with_grad) / 1e9 == pytest.approx(180.89, abs=0.005)
    # one more forward pass of the core in each iteration with gradient
    extra = flops.executed(24, 8, is_recomputed=True) - flops.executed(24, 8, is_recomputed=False)
    assert extra == 8 * flops.iteration
    assert flops.executed(24, 8, is_recomputed=False) == flops.model(24, 8)


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


@pytest.mark.parametrize("is_recomputed", [False, True])
@forms
def test_flops_are_what_torch_counts(form, is_recomputed):
    """Exactly, once full attention is put where causal attention was counted.

    The mathematical kernel multiplies with all T keys; T (T + 1) / 2 of the T^2 pairs are seen.
    """
    model = RecurrentModel(form)
    initialize(model, mean_depth=4, seed=0)
    model.kept_iterations = 0 if is_recomputed else None
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
    expected = SMALL.context * full.executed(3, 2, is_recomputed=is_recomputed)
    if is_recomputed and form.block is Block.pre_norm:
        # recomputing stops at what the backward pass needs: without a last norm, one product less
        expected -= SMALL.context * 2 * (2 * SMALL.inner * SMALL.width)
    assert counter.total == expected


def kept_bytes(run, excluded):
    """Bytes of all storages that autograd keeps for the backward pass of run(), once each."""
    apart = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in apart:
            # the tensor too, so that no address is used twice
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    total = sum(size for size, _ in kept.values())
    del result
    return total


@pytest.mark.parametrize(
    ("dtype", "element_bytes"), [(torch.bfloat16, 2), (torch.float32, 4)], ids=["bf16", "fp32"]
)
@forms
def test_a_layer_keeps_exactly_what_is_counted(form, dtype, element_bytes):
    block = make_block(form).to(dtype)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0, 0.02)
    positions = torch.arange(SMALL.context)[None]
    layout = Layout.at(positions, Mask(), head_width=SMALL.head_width, base=SMALL.rope_base)
    x = torch.randn(1, SMALL.context, SMALL.width, dtype=dtype, requires_grad=True)
    # in float32 the first norm keeps its input itself, which nobody else holds here
    excluded = [*block.parameters(), layout.cos_BTP, layout.sin_BTP]
    kept = kept_bytes(lambda: block(x, layout), excluded)
    assert kept == SMALL.context * layer_activation_bytes(form, element_bytes=element_bytes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@forms
def test_a_row_keeps_what_is_estimated(form, dtype):
    """Within 5 %: the loss, masks and indices are left out of the estimate."""
    model = RecurrentModel(form)
    initialize(model, mean_depth=4, seed=0)
    model.to(dtype)
    tokens = torch.randint(0, SMALL.vocabulary_size, (1, SMALL.context))
    state = torch.randn(1, SMALL.context, SMALL.width, dtype=dtype)
    arguments = {"initial_state": state, "labels": tokens, "keep_logits": False}
    kept = kept_bytes(lambda: model(tokens, [Depth(3, 4)], **arguments), list(model.parameters()))
    size = torch.finfo(dtype).bits // 8
    estimate = row_activation_bytes(form, 4, element_bytes=size, is_checkpointed=False)
    # of the head only the log-probabilities are alive when the forward pass ends
    estimate += head_bytes(SMALL, rows=1, element_bytes=size) * 4 // (8 + size)
    assert kept == pytest.approx(estimate, rel=0.05)


def test_checkpoints_keep_one_iteration_and_the_states():
    def row(backprop, **changes):
        return row_activation_bytes(
            HUGINN, backprop, **({"element_bytes": 2, "is_checkpointed": True} | changes)
        )

    assert row(9) - row(8) == 2 * HUGINN.width * HUGINN.context
    assert row(8, is_checkpointed=False) > 4 * row(8)
    assert row(1) - row(1, is_checkpointed=False) == 2 * HUGINN.width * HUGINN.context


def test_head_holds_one_chunk_whatever_the_rows():
    few = dataclasses.replace(HUGINN, context=1024)
    sizes = [head_bytes(few, rows=rows, element_bytes=2) for rows in (1, 4, 8)]
    assert sizes == [1024 * 65536 * 10, 4096 * 65536 * 10, 4096 * 65536 * 10]
