"""Weights are quantized once for all micro-steps of a step, and anew for the next step."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.testing import load_module, run_ranks

ranks_module = load_module(Path(__file__).with_name("accumulation_ranks.py"))
BOTH = ranks_module.FLOAT8
CASES = [
    {"stage": 1, "accumulation": 4, "float8": BOTH[:1]},
    {"stage": 1, "accumulation": 4, "float8": BOTH},
    {"stage": 1, "accumulation": 1, "float8": BOTH},
    {"stage": 2, "accumulation": 4, "float8": BOTH},
    {"stage": 3, "accumulation": 4, "float8": BOTH},
]
# four matrices of each layer: two in the core, one before and one behind it
CORE, CODA, EVERY = 2 * 4, 4, 4 * 4
by_case = pytest.mark.parametrize("index", range(len(CASES)), ids=lambda i: str(CASES[i]))
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module", params=[1, 2])
def found(request: pytest.FixtureRequest) -> list[Any]:
    results: list[Any] = run_ranks(ranks_module.pairs, request.param, CASES, timeout_s=600)[0]
    return results


@by_case
def test_losses_gradients_and_updates_are_the_same_bits(found: list[Any], index: int) -> None:
    """The first moment after a step is its gradient's; later steps start from new weights."""
    ours, anew = found[index]["ours"], found[index]["anew"]
    assert ours["results"] == anew["results"]
    assert all(is_applied for _, _, is_applied in ours["results"])
    assert len({loss for loss, _, _ in ours["results"]}) == ranks_module.STEPS
    for got, wanted in zip(ours["tensors"], anew["tensors"], strict=True):
        assert got.keys() == wanted.keys()
        assert any(key.startswith("exp_avg/") for key in got)
        for key, value in wanted.items():
            assert torch.equal(got[key], value), key
    losses = [losses for losses, _ in ours["validated"]]
    assert losses == [losses for losses, _ in anew["validated"]]
    assert losses[0] != losses[1] != losses[2]


@by_case
def test_each_weight_is_quantized_once_a_step(found: list[Any], index: int) -> None:
    """Under ZeRO-3 in each of the four passes, as without held copies at any stage."""
    case = CASES[index]
    op, matrices = (
        ("quantize_both_ways", EVERY) if len(case["float8"]) == 2 else ("quantize_rows", CORE)
    )
    often = {op: matrices * case["accumulation"]}
    once = {op: matrices} if case["stage"] < 3 else often
    assert found[index]["anew"]["counts"] == [often] * ranks_module.STEPS
    assert found[index]["ours"]["counts"] == [once] * ranks_module.STEPS


@by_case
def test_copies_stay_only_where_another_pass_can_take_them(found: list[Any], index: int) -> None:
    """With one micro-step they would only lie there during its backward pass."""
    case = CASES[index]
    assert found[index]["ours"]["stays"] is (case["stage"] < 3 and case["accumulation"] > 1)


@by_case
def test_each_weight_is_quantized_once_a_validation(found: list[Any], index: int) -> None:
    """Under ZeRO-3 in each of its two passes, where the coda runs once for each of two depths."""
    case = CASES[index]
    is_everywhere = len(case["float8"]) == 2
    if case["stage"] < 3:
        expected = EVERY if is_everywhere else CORE
    else:
        expected = 2 * (EVERY + CODA if is_everywhere else CORE)
    for _, counts in found[index]["ours"]["validated"]:
        assert counts == {"quantize_rows": expected}


@pytest.mark.parametrize("stage", [1, 2])
def test_no_weight_changes_where_copies_stay(stage: int) -> None:
    said = run_ranks(ranks_module.refused, 1, stage, timeout_s=240)[0]
    inside = ["step inside of accumulation or evaluation", "weights change inside of fixed_weights"]
    assert said == inside * 2
