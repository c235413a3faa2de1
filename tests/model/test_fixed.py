"""Weights that stand still are quantized once, and a copy never outlives what it is a copy of."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.model.config import ComputePath, ProductPrecision
from pretrain.model.depth import Depth
from pretrain.model.fixed import fixed_weights, has_fixed_weights
from pretrain.testing import load_module

PATHS = load_module(Path(__file__).parent / "fused" / "both_paths.py")
PREFIX = {"no_grad_precision": ProductPrecision.fp8}
ALL = PREFIX | {"grad_precision": ProductPrecision.fp8}
# rows of different depths; one without a prefix, one without gradient
PASSES = [
    [Depth(3, 2), Depth(1, 2)],
    [Depth(0, 2), Depth(0, 1)],
    [Depth(4, 0), Depth(2, 3)],
    [Depth(1, 1), Depth(1, 1)],
]
# the small model's layers, four matrices each
CORE, EVERY = 2 * 4, 5 * 4


def model_of(**precisions: ProductPrecision) -> Any:
    return PATHS.model_of(ComputePath.fused, torch.bfloat16, **precisions)


def run(model: Any, number: int) -> tuple[Any, dict[str, Any]]:
    """The loss and the gradients of one pass."""
    inputs = PATHS.batch(2, torch.bfloat16, seed=number)
    return PATHS.gradients(model, inputs, PASSES[number])


def evaluate(model: Any) -> Any:
    with torch.no_grad():
        return model(depths=PASSES[0], **PATHS.batch(2, torch.bfloat16)).loss


def assert_equal(found: tuple[Any, dict[str, Any]], wanted: tuple[Any, dict[str, Any]]) -> None:
    assert torch.equal(found[0], wanted[0])
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert torch.equal(found[1][name], gradient), name


@pytest.mark.parametrize(
    ("precisions", "once", "each"),
    [
        (PREFIX, {"quantize_rows": CORE}, {"quantize_rows": 3 * CORE}),
        (ALL, {"quantize_both_ways": EVERY}, {"quantize_both_ways": 4 * EVERY}),
    ],
    ids=["prefix", "all"],
)
@pytest.mark.parametrize("kept_iterations", [None, 0], ids=["kept", "recomputed"])
def test_all_passes_share_one_copy_and_give_the_same_bits(
    precisions: Any, once: Any, each: Any, kept_iterations: int | None
) -> None:
    model = model_of(**precisions)
    model.kept_iterations = kept_iterations
    with PATHS.counted_copies() as counted:
        wanted = [run(model, number) for number in range(len(PASSES))]
    assert counted == each
    with PATHS.counted_copies() as counted, fixed_weights(model):
        found = [run(model, number) for number in range(len(PASSES))]
    assert counted == once
    for one, other in zip(found, wanted, strict=True):
        assert_equal(one, other)


def test_weights_that_change_in_between_are_quantized_anew() -> None:
    model = model_of(**ALL)
    for _ in range(2):
        wanted = run(model, 0)
        with fixed_weights(model):
            assert_equal(run(model, 0), wanted)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.25)
        assert not torch.equal(run(model, 0)[0], wanted[0])


def test_transposed_copies_are_made_when_the_first_gradient_asks() -> None:
    model = model_of(**ALL)
    wanted = evaluate(model), run(model, 1)
    with PATHS.counted_copies() as counted, fixed_weights(model):
        assert torch.equal(evaluate(model), wanted[0])
        assert counted == {"quantize_rows": EVERY}
        assert_equal(run(model, 1), wanted[1])
        # which then serve passes without gradient, too
        assert torch.equal(evaluate(model), wanted[0])
        assert counted == {"quantize_rows": EVERY, "quantize_both_ways": EVERY}


def test_the_outermost_exit_drops_the_copies() -> None:
    model = model_of(**PREFIX)
    with PATHS.counted_copies() as counted:
        with fixed_weights(model):
            evaluate(model)
            with fixed_weights(model):
                evaluate(model)
            evaluate(model)
            assert has_fixed_weights(model)
        assert counted == {"quantize_rows": CORE}
        assert not has_fixed_weights(model)
        evaluate(model)
        evaluate(model)
    assert counted == {"quantize_rows": 3 * CORE}


def test_an_exception_drops_the_copies() -> None:
    model = model_of(**ALL)

    def passes() -> None:
        with fixed_weights(model):
            run(model, 0)
            run(model, len(PASSES))

    with pytest.raises(IndexError):
        passes()
    assert not has_fixed_weights(model)
    with torch.no_grad():
        model.core.iteration.layers[1].mlp.down.zero_()
    wanted = run(model, 0)
    with fixed_weights(model):
        assert_equal(run(model, 0), wanted)


@pytest.mark.parametrize("part", ["core.iteration.layers.1", "prelude.0", "coda.0"])
def test_a_write_is_noticed_by_the_next_pass(part: str) -> None:
    model = model_of(**ALL)
    with fixed_weights(model):
        run(model, 0)
        with torch.no_grad():
            model.get_parameter(f"{part}.mlp.gate_up").add_(1.0)
        with pytest.raises(RuntimeError, match=r"matrix gate_up was written to.*Leave fixed_weig"):
            run(model, 0)
    run(model, 0)


@pytest.mark.parametrize("assign", [False, True])
def test_weights_loaded_inside_are_noticed_by_the_next_pass(assign: bool) -> None:
    model, other = (model_of(**PREFIX) for _ in range(2))
    with torch.no_grad():
        other.core.iteration.layers[1].mlp.down.mul_(2.0)
    wanted = evaluate(other)
    with fixed_weights(model):
        assert not torch.equal(evaluate(model), wanted)
        model.load_state_dict(other.state_dict(), assign=assign)
        with pytest.raises(RuntimeError, match="matrix qkv was written to, or moved"):
            evaluate(model)
    with fixed_weights(model):
        assert torch.equal(evaluate(model), wanted)


def test_other_memory_is_noticed_by_the_next_pass() -> None:
    """Also where the old one is gone and its address free."""
    model = model_of(**PREFIX)
    weight = model.core.iteration.layers[0].attention.qkv
    with fixed_weights(model):
        evaluate(model)
        for _ in range(3):
            weight.data = torch.zeros_like(weight)
            with pytest.raises(RuntimeError, match=r"matrix qkv was written to, or moved"):
                evaluate(model)


def test_a_backward_pass_may_come_after_the_end() -> None:
    model = model_of(**ALL)
    loss, wanted = run(model, 0)
    model.zero_grad()
    with fixed_weights(model):
        late = model(depths=PASSES[0], **PATHS.batch(2, torch.bfloat16, seed=0)).loss
    late.backward()
    assert_equal((late.detach(), {n: p.grad for n, p in model.named_parameters()}), (loss, wanted))


def test_weights_in_bf16_are_never_copied() -> None:
    model = model_of()
    with PATHS.counted_copies() as counted, fixed_weights(model):
        run(model, 0)
    assert not counted
