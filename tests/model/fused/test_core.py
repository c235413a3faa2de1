"""The hand-written passes against autograd through the plain modules."""

import dataclasses

import pytest
import torch

from pretrain.errors import ConfigError
from pretrain.model.config import ComputePath, DocumentMask, ModelConfig, ProductPrecision
from pretrain.model.depth import Depth
from pretrain.model.init import initialize
from pretrain.model.recurrent import RecurrentModel

SMALL = ModelConfig(
    name="small", width=96, heads=2, inner=160, prelude_layers=2, core_layers=2, coda_layers=1,
    vocabulary_size=61, context=19,
)  # fmt: skip
DEPTHS = {
    "one row": [Depth(2, 3)],
    "no prefix": [Depth(0, 3), Depth(0, 3)],
    "one iteration": [Depth(0, 1)],
    "a depth for each row": [Depth(0, 2), Depth(4, 3), Depth(1, 3), Depth(0, 3)],
    "suffixes that end inside": [Depth(3, 1), Depth(0, 3), Depth(2, 2)],
    "a row without gradient": [Depth(3, 0), Depth(1, 2)],
}


def models(dtype=torch.float64, **changes):
    """The plain model and the fused one, with the same weights."""
    config = dataclasses.replace(SMALL, **changes)
    found = []
    for path in (ComputePath.reference, ComputePath.fused):
        model = RecurrentModel(dataclasses.replace(config, path=path)).to(dtype)
        initialize(model, mean_depth=3, seed=1)
        with torch.no_grad():
            for parameter in model.parameters():
                # gains are 1 and biases 0 at the start, which would hide a mistake
                if parameter.ndim != 2:
                    generator = torch.Generator().manual_seed(parameter.numel())
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        found.append(model)
    return found


def batch(rows, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(61, (rows, 20), generator=generator)
    return {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "initial_state": torch.randn(rows, 19, 96, generator=generator, dtype=dtype),
        "keep_logits": False,
    }


def gradients(model, inputs, depths):
    """The loss and the gradient of every parameter."""
    model.zero_grad()
    output = model(depths=depths, **inputs)
    output.loss.backward()
    return output.loss.detach(), {n: p.grad for n, p in model.named_parameters()}


# float64 rounds at 1e-16; sums over a few hundred terms and six layers leave three digits less.
TOLERANCE = 1e-12


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


def test_recomputing_iterations_changes_no_bit():
    depths = DEPTHS["a depth for each row"]
    _, fused = models(torch.float32)
    inputs = batch(len(depths), torch.float32)
    results = []
    for kept_iterations in (None, 0, 2):
        fused.kept_iterations = kept_iterations
        results.append(gradients(fused, inputs, depths))
    for loss, found in results[1:]:
        assert torch.equal(loss, results[0][0])
        for name, gradient in results[0][1].items():
            assert torch.equal(found[name], gradient), name


def test_iterations_with_and_without_gradient_give_the_same_bits():
    _, fused = models(torch.bfloat16)
    inputs = batch(2, torch.bfloat16)
    with_gradient = fused(depths=[Depth(2, 3)] * 2, **inputs).state
    with torch.no_grad():
        without = fused(depths=[Depth(5, 0)] * 2, **inputs).state
    assert torch.equal(with_gradient, without)


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
    narrow = float8_model(precisions)
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


def float8_model(precisions):
    config = dataclasses.replace(SMALL, path=ComputePath.fused, **precisions)
    return RecurrentModel(config).to(torch.bfloat16)


def test_recomputing_in_float8_changes_no_bit():
    fused = float8_model(FLOAT8["all"])
    fused.load_state_dict(models(torch.bfloat16)[0].state_dict())
    results = []
    for kept_iterations in (None, 0):
        fused.kept_iterations = kept_iterations
        results.append(gradients(fused, batch(2, torch.bfloat16), [Depth(2, 3)] * 2))
    for name, gradient in results[0][1].items():
        assert torch.equal(results[1][1][name], gradient), name


def test_documents_may_be_isolated():
    plain, fused = models(documents=DocumentMask.isolated)
    inputs = batch(2) | {"documents": torch.arange(19).div(7, rounding_mode="floor").expand(2, 19)}
    wanted_loss, wanted = gradients(plain, inputs, [Depth(1, 2)] * 2)
    loss, found = gradients(fused, inputs, [Depth(1, 2)] * 2)
    torch.testing.assert_close(loss, wanted_loss, rtol=TOLERANCE, atol=0)
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() < TOLERANCE * gradient.norm(), name


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
