"""Bytes kept for the backward pass, against what torch really keeps."""

import dataclasses
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model_forms import HUGINN, SMALL, forms
from pretrain.model.activations import (
    float8_bytes,
    head_bytes,
    layer_activation_bytes,
    peak_activation_bytes,
    row_activation_bytes,
)
from pretrain.model.block import make_block
from pretrain.model.config import ComputePath, ProductPrecision
from pretrain.model.depth import Depth
from pretrain.model.fixed import fixed_weights
from pretrain.model.init import initialize
from pretrain.model.layout import Layout, Mask
from pretrain.model.recurrent import RecurrentModel


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
    estimate = row_activation_bytes(form, 4, element_bytes=size, kept_iterations=None)
    # of the head only the log-probabilities are alive when the forward pass ends
    estimate += head_bytes(SMALL, rows=1, element_bytes=size) * 4 // (8 + size)
    assert kept == pytest.approx(estimate, rel=0.05)


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made meanwhile that are still alive."""

    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if self.holds(t)}
        for tensor in filter(self.holds, tree_leaves(result)):
            storage = tensor.untyped_storage()
            key = storage.data_ptr()
            if key not in given and key not in self.sizes:
                self.sizes[key] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, key)
        return result

    @staticmethod
    def holds(value):
        """Whether it is a tensor with memory."""
        return isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() > 0


FUSED = dataclasses.replace(SMALL, path=ComputePath.fused)
FLOAT8 = dataclasses.replace(FUSED, grad_precision=ProductPrecision.fp8)


@pytest.mark.parametrize("kept", [None, 1, 2])
@pytest.mark.parametrize("form", [FUSED, FLOAT8], ids=["bf16", "float8"])
def test_a_fused_row_keeps_what_is_counted(form, kept):
    """Within 1 %: the loss, rotary angles and indices are left out of the count.

    When the forward pass ends, with the logits of its last chunk, and before any sum of gradients.
    """
    model = RecurrentModel(form)
    initialize(model, mean_depth=4, seed=0)
    model.to(torch.bfloat16)
    model.kept_iterations = kept
    tokens = torch.randint(0, form.vocabulary_size, (1, form.context))
    state = torch.randn(1, form.context, form.width, dtype=torch.bfloat16)
    with LiveBytes() as live:
        output = model(tokens, [Depth(3, 4)], initial_state=state, labels=tokens, keep_logits=False)
        total = sum(live.sizes.values())
    assert output.nats.requires_grad
    expected = row_activation_bytes(form, 4, element_bytes=2, kept_iterations=kept)
    expected += form.context * form.vocabulary_size * 2
    expected += float8_bytes(form, has_coda=True)
    assert total == pytest.approx(expected, rel=0.01)


PREFIX = dataclasses.replace(FUSED, no_grad_precision=ProductPrecision.fp8)


@pytest.mark.parametrize("form", [PREFIX, FLOAT8], ids=["prefix", "float8"])
def test_copies_of_fixed_weights_are_exactly_what_is_counted(form):
    """Once a pass is over, but for its gradients and what belongs to nobody's pass."""
    model = RecurrentModel(form)
    initialize(model, mean_depth=4, seed=0)
    model.to(torch.bfloat16)
    tokens = torch.randint(0, form.vocabulary_size, (1, form.context))
    state = torch.randn(1, form.context, form.width, dtype=torch.bfloat16)
    arguments = {"initial_state": state, "labels": tokens, "keep_logits": False}
    with LiveBytes() as live:
        model(tokens, [Depth(3, 4)], **arguments).nats.backward()
        before = sum(live.sizes.values())
        with fixed_weights(model):
            for _ in range(2):
                model(tokens, [Depth(3, 4)], **arguments).nats.backward()
            held = sum(live.sizes.values()) - before
        after = sum(live.sizes.values()) - before
    assert held == float8_bytes(form, has_coda=True, is_kept=True) > 0
    assert after == 0


def row(form, backprop, kept=None):
    return row_activation_bytes(form, backprop, element_bytes=2, kept_iterations=kept)


def test_recomputed_iterations_cost_their_state_and_one_at_a_time():
    assert row(HUGINN, 9, 0) - row(HUGINN, 8, 0) == 2 * HUGINN.width * HUGINN.context
    assert row(HUGINN, 8) > 4 * row(HUGINN, 8, 0)
    assert row(HUGINN, 1, 0) - row(HUGINN, 1) == 2 * HUGINN.width * HUGINN.context


def test_kept_iterations_cost_as_much_as_without_recomputation():
    """Kept ones are gone when the first is computed again, so one of either is the same."""
    for form in (HUGINN, dataclasses.replace(HUGINN, path=ComputePath.fused)):
        sizes = [row(form, 8, kept) for kept in (0, 1, 2, 3, 8, 9)]
        assert sizes[3] - sizes[2] == sizes[2] - sizes[1] > 0
        assert sizes[4] == sizes[5] == row(form, 8)
    fused = dataclasses.replace(HUGINN, path=ComputePath.fused)
    assert row(fused, 8, 1) == row(fused, 8, 0)


def test_a_fused_layer_of_huginn_keeps_less_than_half_of_a_plain_one():
    """16 D + 4 I bytes and statistics; 14 D + 4 I where normed vectors are float8."""
    fused = dataclasses.replace(HUGINN, path=ComputePath.fused)
    float8 = dataclasses.replace(fused, grad_precision=ProductPrecision.fp8)
    size = layer_activation_bytes(fused, element_bytes=2)
    assert size == 16 * 5280 + 4 * 17920 + 4 * (55 + 4)
    assert layer_activation_bytes(float8, element_bytes=2) == size - 2 * 5280 + 8
    assert size < layer_activation_bytes(HUGINN, element_bytes=2) / 2


def test_sums_of_gradients_stand_beside_what_is_kept():
    """Float32 over several iterations; one is summed in the type of the weights. Of a small head,
    so that the fullest moment is in the core."""
    fused = dataclasses.replace(HUGINN, path=ComputePath.fused, vocabulary_size=8)
    core = 1_581_592_320 + 55_756_800
    layer = HUGINN.context * layer_activation_bytes(fused, element_bytes=2)

    def peak(backprop, kept=None):
        return peak_activation_bytes(fused, backprop, rows=1, element_bytes=2, kept_iterations=kept)

    assert peak(8) - peak(7) == row(fused, 8) - row(fused, 7)
    assert peak(2) - peak(1) == 2 * core + row(fused, 2) - row(fused, 1)
    # the second iteration is whole beside the sums, where the first had its first layer left
    more = row(fused, 2, 0) - row(fused, 1, 0) + 3 * layer + 2 * HUGINN.width * HUGINN.context
    assert peak(2, 0) - peak(1, 0) == 2 * core + more


def test_head_holds_one_chunk_whatever_the_rows():
    few = dataclasses.replace(HUGINN, context=1024)
    sizes = [head_bytes(few, rows=rows, element_bytes=2) for rows in (1, 4, 8)]
    assert sizes == [1024 * 65536 * 10, 4096 * 65536 * 10, 4096 * 65536 * 10]
    fused = dataclasses.replace(few, path=ComputePath.fused)
    sizes = [head_bytes(fused, rows=rows, element_bytes=2) for rows in (1, 8, 16)]
    weight = 65536 * 5280
    assert sizes == [
        1024 * 65536 * 2 + 2 * weight, 8192 * 65536 * 2 + 2 * weight, 8192 * 65536 * 2 + 6 * weight,
    ]  # fmt: skip
