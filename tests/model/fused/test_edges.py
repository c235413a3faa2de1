"""What the fused path refuses, notices or bears, where a mistake would go unseen."""

import logging
from pathlib import Path

import pytest
import torch

from pretrain.errors import ConfigError
from pretrain.model.config import ComputePath, ProductPrecision
from pretrain.model.depth import Depth
from pretrain.model.fused import products, weights
from pretrain.model.fused.weights import check_float8
from pretrain.model.layout import Layout, Mask
from pretrain.testing import load_module

PATHS = load_module(Path(__file__).with_name("both_paths.py"))
FLOAT8 = {"no_grad_precision": ProductPrecision.fp8, "grad_precision": ProductPrecision.fp8}


def layout(rows=2):
    positions = torch.arange(19).expand(rows, 19)
    return Layout.at(positions, Mask(), head_width=48, base=PATHS.SMALL.rope_base)


def test_kept_states_with_gradients_are_refused_and_without_are_right():
    plain, fused = PATHS.models()
    inputs, depths = PATHS.batch(2), [Depth(1, 2), Depth(0, 2)]
    with pytest.raises(ConfigError, match=r"after iterations \[0, 1, 2, 3\].*no_grad"):
        fused(depths=depths, return_states=True, **inputs)
    with pytest.raises(ConfigError, match=r"after iterations \[1\]"):
        fused(depths=depths, evaluate_depths=[1], **inputs)
    with torch.no_grad():
        wanted = plain(depths=depths, return_states=True, **inputs).states
        found = fused(depths=depths, return_states=True, **inputs).states
    assert len(found) == len(wanted) == 4
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=PATHS.TOLERANCE, atol=PATHS.TOLERANCE)


def test_an_initial_state_that_wants_a_gradient_is_refused():
    _, fused = PATHS.models()
    inputs = PATHS.batch(1)
    inputs["initial_state"].requires_grad_()
    with pytest.raises(ConfigError, match="initial_state requires"):
        fused(depths=[Depth(0, 2)], **inputs)


def test_the_core_takes_embedded_tokens_of_any_strides():
    plain, fused = PATHS.models()
    generator = torch.Generator().manual_seed(0)
    embedded = torch.randn(19, 2, 96, generator=generator, dtype=torch.float64)
    start = torch.randn(2, 19, 96, generator=generator, dtype=torch.float64)
    results = []
    for model in (plain, fused):
        leaf = embedded.clone().requires_grad_()
        last, *_ = model.core(
            leaf.transpose(0, 1), start, depths=[Depth(1, 2)] * 2, layout=layout()
        )
        # a gradient of other strides, too
        last.transpose(0, 1).square().sum().backward()
        assert leaf.grad is not None
        results.append((last.detach(), leaf.grad, model.core.iteration.adapter.grad))
    for found, wanted in zip(results[1], results[0], strict=True):
        assert (found - wanted).norm() < PATHS.TOLERANCE * wanted.norm()


def test_a_layer_takes_any_strides():
    plain, fused = PATHS.models()
    wide = torch.randn(2, 19, 200, dtype=torch.float64)
    results = []
    for model in (plain, fused):
        leaf = wide.clone().requires_grad_()
        model.prelude[0](leaf[..., :96], layout()).square().sum().backward()
        assert leaf.grad is not None
        results.append(leaf.grad)
    assert (results[1] - results[0]).norm() < PATHS.TOLERANCE * results[0].norm()


def test_rows_may_have_one_token():
    plain, fused = PATHS.models(context=1)
    inputs, depths = PATHS.batch(3, context=1), [Depth(1, 2), Depth(0, 1), Depth(2, 1)]
    assert not inputs["labels"].flatten().is_contiguous()
    wanted_loss, wanted = PATHS.gradients(plain, inputs, depths)
    loss, found = PATHS.gradients(fused, inputs, depths)
    torch.testing.assert_close(loss, wanted_loss, rtol=PATHS.TOLERANCE, atol=0)
    # a token that sees itself alone: attention's output is its value, whatever the query and key
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= PATHS.TOLERANCE * wanted_norm(wanted), name


def wanted_norm(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()


def test_writing_to_what_the_backward_pass_needs_is_noticed():
    _, fused = PATHS.models()
    layer, inputs = fused.prelude[0], PATHS.batch(2)
    x = inputs["initial_state"].clone()
    loss = layer(x, layout()).sum()
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = fused(depths=[Depth(0, 2)] * 2, **inputs).loss
    inputs["initial_state"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_derivatives_are_refused():
    _, fused = PATHS.models()
    loss = fused(depths=[Depth(0, 2)], **PATHS.batch(1)).loss
    adapter = fused.core.iteration.adapter
    (gradient,) = torch.autograd.grad(loss.square(), adapter, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_parameters_without_gradient_get_none():
    _, fused = PATHS.models()
    _, wanted = PATHS.gradients(fused, PATHS.batch(1), [Depth(1, 2)])
    frozen = {"core.iteration.adapter", "core.iteration.layers.0.norm_1.gain"}
    for name, parameter in fused.named_parameters():
        parameter.requires_grad_(name not in frozen)
    _, found = PATHS.gradients(fused, PATHS.batch(1), [Depth(1, 2)])
    assert {name for name, gradient in found.items() if gradient is None} == frozen
    assert all(torch.equal(found[name], wanted[name]) for name in found.keys() - frozen)


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_without_gradients_the_loss_is_the_same_bits(mode, dtype):
    _, fused = PATHS.models(dtype)
    inputs, depths = PATHS.batch(2, dtype), [Depth(1, 2), Depth(3, 1)]
    wanted, _ = PATHS.gradients(fused, inputs, depths)
    with mode():
        output = fused(depths=depths, **inputs)
    assert torch.equal(output.loss, wanted)
    assert not output.loss.requires_grad


def test_nan_passes_through_float8():
    fused = PATHS.model_of(ComputePath.fused, torch.bfloat16, **FLOAT8)
    with torch.no_grad():
        fused.core.iteration.layers[0].mlp.gate_up[3, 5] = float("nan")
    loss, found = PATHS.gradients(fused, PATHS.batch(1, torch.bfloat16), [Depth(1, 2)])
    assert loss.isnan()
    assert all(gradient.isnan().any() for gradient in found.values())


def test_float8_on_a_cpu_is_said_once_to_save_no_time(caplog):
    products._announce_emulation.cache_clear()
    fused = PATHS.model_of(ComputePath.fused, torch.bfloat16, **FLOAT8)
    with caplog.at_level(logging.WARNING):
        PATHS.gradients(fused, PATHS.batch(1, torch.bfloat16), [Depth(1, 2)])
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(said) == 1
    assert "float8 products on cpu" in said[0]


@pytest.mark.parametrize("name", FLOAT8)
@pytest.mark.parametrize(("width", "inner"), [(72, 160), (96, 168)])
def test_widths_that_gpus_do_not_multiply_in_float8_are_refused(name, width, inner):
    with pytest.raises(ConfigError, match=rf"model\.{name}=fp8 needs .* {width} and {inner}"):
        PATHS.model_of(
            ComputePath.fused, torch.bfloat16, width=width, inner=inner,
            **{name: ProductPrecision.fp8},
        )  # fmt: skip


@pytest.mark.parametrize(("capability", "is_refused"), [((8, 0), True), ((8, 9), False)])
def test_gpus_without_float8_are_refused_by_name(monkeypatch, capability, is_refused):
    check_float8.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    check_float8(torch.device("cpu"))
    if is_refused:
        said = r"NVIDIA A100 has compute capability 8\.0, .* model\.no_grad_precision=same"
        with pytest.raises(ConfigError, match=said):
            check_float8(torch.device("cuda", 0))
    else:
        check_float8(torch.device("cuda", 0))
    check_float8.cache_clear()


def test_the_gpu_is_looked_at_before_anything_is_quantized(monkeypatch):
    def refuse(device):
        raise ConfigError(f"not on {device}")

    monkeypatch.setattr(weights, "check_float8", refuse)
    fused = PATHS.model_of(ComputePath.fused, torch.bfloat16, **FLOAT8)
    with PATHS.counted_copies() as counted, pytest.raises(ConfigError, match="not on cpu"):
        fused(depths=[Depth(1, 2)], **PATHS.batch(1, torch.bfloat16))
    assert not counted
