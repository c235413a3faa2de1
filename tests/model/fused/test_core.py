"""The hand-written passes against autograd through the plain modules."""

import dataclasses
from pathlib import Path

import pytest
import torch

from pretrain.errors import ConfigError
from pretrain.model.config import ComputePath, DocumentMask, ProductPrecision
from pretrain.model.depth import Depth
from pretrain.testing import load_module

PATHS = load_module(Path(__file__).with_name("both_paths.py"))
SMALL, TOLERANCE = PATHS.SMALL, PATHS.TOLERANCE
model_of, models, batch, gradients = PATHS.model_of, PATHS.models, PATHS.batch, PATHS.gradients

DEPTHS = {
    "one row": [Depth(2, 3)],
    "no prefix": [Depth(0, 3), Depth(0, 3)],
    "one iteration": [Depth(0, 1)],
    "a depth for each row": [Depth(0, 2), Depth(4, 3), Depth(1, 3), Depth(0, 3)],
    "suffixes that end inside": [Depth(3, 1), Depth(0, 3), Depth(2, 2)],
    "a row without gradient": [Depth(3, 0), Depth(1, 2)],
}


@pytest.mark.parametrize("depths", DEPTHS.values(), ids=DEPTHS.keys())
@pytest.mark.parametrize("kept_iterations", [None, 0, 1], ids=["kept", "recomputed", "one kept"])
def test_losses_and_gradients_are_those_of_the_plain_modules(depths, kept_iterations):
    plain, fused = models()
    inputs = batch(len(depths))
    wanted_loss, wanted = gradients(plain, inputs, depths)
    fused.kept_iterations = kept_iterations
    loss, found = gradients(fused, inputs, depths)
    torch.testing.assert_close(loss, wanted_loss, rtol=TOLERANCE, atol=0)
    for name, gradient in wanted.items():
        distance = (found[name] - gradient).norm() / gradient.norm()
        assert distance < TOLERANCE, f"{name}: {distance}"


def test_sums_over_iterations_are_wide():
    """With 16-bit weights the fused sum is nearer to float64 than autograd's own."""
    depths = [Depth(0, 8)] * 2
    errors = {}
    plain, fused = models(torch.bfloat16)
    exact, _ = models(torch.float64)
    exact.load_state_dict(plain.state_dict())
    inputs = batch(2, torch.bfloat16)
    wide = {**inputs, "initial_state": inputs["initial_state"].double()}
    _, wanted = gradients(exact, wide, depths)
    for name, model in (("plain", plain), ("fused", fused)):
        _, found = gradients(model, inputs, depths)
        matrices = [n for n in wanted if "core" in n and wanted[n].ndim == 2]
        errors[name] = sum(
            float((found[n].double() - wanted[n]).norm() / wanted[n].norm()) for n in matrices
        )
    assert errors["fused"] < errors["plain"], errors


FLOAT8 = {
    "prefix": {"no_grad_precision": ProductPrecision.fp8},
    "all": {"no_grad_precision": ProductPrecision.fp8, "grad_precision": ProductPrecision.fp8},
}


@pytest.mark.parametrize("precisions", FLOAT8.values(), ids=FLOAT8.keys())
def test_float8_products_stay_near_and_do_something(precisions):
    """A float8 product errs by about 2^-4 / sqrt(3) x sqrt(2) = 5 %; four in a row by 10 %."""
    depths = [Depth(4, 3), Depth(1, 2)]
    wide, _ = models(torch.float64)
    narrow = model_of(ComputePath.fused, torch.bfloat16, **precisions)
    narrow.load_state_dict(wide.state_dict())
    inputs = batch(2, torch.bfloat16)
    exact = {**inputs, "initial_state": inputs["initial_state"].double()}
    wanted_loss, wanted = gradients(wide, exact, depths)
    loss, found = gradients(narrow, inputs, depths)
    assert 0 < (loss.double() - wanted_loss).abs() < 0.02 * wanted_loss
    for name, gradient in wanted.items():
        distance = (found[name].double() - gradient).norm() / gradient.norm()
        assert distance < 0.25, f"{name}: {distance}"
    bf16 = gradients(models(torch.bfloat16)[1], inputs, depths)
    assert not torch.equal(bf16[0], loss)
    changed = {name for name in found if not torch.equal(found[name], bf16[1][name])}
    assert changed == set(found)


def test_documents_may_be_isolated():
    plain, fused = models(documents=DocumentMask.isolated)
    inputs = batch(2) | {"documents": torch.arange(19).div(7, rounding_mode="floor").expand(2, 19)}
    wanted_loss, wanted = gradients(plain, inputs, [Depth(1, 2)] * 2)
    loss, found = gradients(fused, inputs, [Depth(1, 2)] * 2)
    torch.testing.assert_close(loss, wanted_loss, rtol=TOLERANCE, atol=0)
    for name, distance in PATHS.distances(found, wanted).items():
        assert distance < TOLERANCE, f"{name}: {distance}"


def test_losses_at_depths_are_those_of_the_plain_modules():
    plain, fused = models()
    inputs = {key: value for key, value in batch(3).items() if key != "keep_logits"}
    tokens = inputs.pop("tokens")
    wanted = plain.losses_at(tokens, [1, 2, 5], **inputs)
    found = fused.losses_at(tokens, [1, 2, 5], **inputs)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_every_parameter_reports_its_gradient_once():
    _, fused = models()
    calls = []
    for name, parameter in fused.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: calls.append(name))
    gradients(fused, batch(2), [Depth(1, 3)] * 2)
    assert sorted(calls) == sorted(name for name, _ in fused.named_parameters())


def test_gradients_leave_layer_by_layer():
    """The core's last layer first, while the gradients of those before it are still to come."""
    _, fused = models()
    core = {name: p for name, p in fused.named_parameters() if name.startswith("core.")}
    there: list[tuple[str, int]] = []

    def note(name: str) -> None:
        there.append((name, sum(p.grad is not None for p in core.values())))

    for name, parameter in core.items():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: note(name))
    gradients(fused, batch(2), [Depth(2, 3), Depth(1, 2)])
    assert [count for _, count in there] == list(range(1, len(core) + 1))
    order = [name.removeprefix("core.iteration.") for name, _ in there]
    # the gain of a layer's first norm belongs to the layer before it, which computes that norm
    stages = [0 if name == "adapter" else int(name.split(".")[1]) + 1 for name in order]
    ends = [stage - ("norm_1" in name) for stage, name in zip(stages, order, strict=True)]
    assert ends == sorted(ends, reverse=True)
    assert len(set(ends)) == SMALL.core_layers + 1


def test_the_last_layer_alone_may_want_gradients():
    plain, fused = models()
    inputs, depths = batch(2), [Depth(2, 3), Depth(1, 2)]
    _, wanted = gradients(plain, inputs, depths)
    last = f"core.iteration.layers.{SMALL.core_layers - 1}.mlp.down"
    for name, parameter in fused.named_parameters():
        parameter.requires_grad_(name == last)
    fused(depths=depths, **inputs).loss.backward()
    found = {name: p.grad for name, p in fused.named_parameters() if p.grad is not None}
    assert found.keys() == {last}
    distance = (found[last] - wanted[last]).norm() / wanted[last].norm()
    assert distance < TOLERANCE


def test_a_second_backward_pass_is_refused():
    _, fused = models()
    loss = fused(depths=[Depth(1, 2)], **batch(1)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once"):
        loss.backward()


def test_nan_in_a_weight_reaches_every_gradient():
    _, fused = models()
    with torch.no_grad():
        fused.core.iteration.layers[0].mlp.down[0, 0] = float("nan")
    loss, found = gradients(fused, batch(1), [Depth(1, 2)])
    assert loss.isnan()
    assert all(gradient.isnan().any() for gradient in found.values())


def test_models_of_another_form_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"model\.norm_gain=False"):
        dataclasses.replace(SMALL, path=ComputePath.fused, norm_gain=False)


@pytest.mark.parametrize("name", ["no_grad_precision", "grad_precision"])
def test_float8_without_the_fused_path_is_refused(name):
    with pytest.raises(ConfigError, match=rf"model\.{name}=fp8 needs model\.path=fused"):
        dataclasses.replace(SMALL, **{name: ProductPrecision.fp8})
