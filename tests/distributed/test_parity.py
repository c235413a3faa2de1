"""Equal mathematics on every engine setting, and checkpoints that fit any number of ranks.

Each number of ranks is started once and does all its cases: a start costs seconds.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.engine.checkpoint import load_weights, newest_checkpoint, read_state
from pretrain.testing import load_module, run_ranks

# Every pair of values of (stage, ranks, accumulation, checkpointed, precision) occurs.
FIELDS = ("ranks", "stage", "accumulation", "checkpointed", "precision")
MATRIX = [
    dict(zip(FIELDS, values, strict=True))
    for values in [
        (1, 1, 4, False, "fp32"),
        (1, 2, 1, True, "bf16"),
        (1, 3, 4, True, "fp32"),
        (2, 1, 1, True, "bf16"),
        (2, 2, 4, False, "fp32"),
        (2, 3, 1, False, "fp32"),
        (2, 3, 4, True, "bf16"),
        (4, 1, 4, True, "fp32"),
        (4, 2, 4, False, "bf16"),
        (4, 3, 1, False, "bf16"),
    ]
]
# Without clipping and with it, accumulated or not, for both optimizers, at every stage.
MATRIX += [
    {"ranks": 1, "stage": 1, "accumulation": 1, "clip": 0.0},
    {"ranks": 1, "stage": 2, "accumulation": 4, "clip": 0.0, "optimizer": "adamw"},
    {"ranks": 1, "stage": 3, "accumulation": 1, "optimizer": "adamw"},
    {"ranks": 2, "stage": 1, "accumulation": 4, "clip": 0.0, "optimizer": "adamw"},
    {"ranks": 2, "stage": 2, "accumulation": 1, "clip": 0.0},
    {"ranks": 2, "stage": 3, "accumulation": 4, "optimizer": "adamw"},
    {"ranks": 4, "stage": 1, "accumulation": 1, "optimizer": "adamw"},
    {"ranks": 4, "stage": 2, "accumulation": 1, "clip": 0.0, "optimizer": "adamw"},
    {"ranks": 4, "stage": 3, "accumulation": 4, "clip": 0.0},
]
POISONED = [
    {"stage": 1, "accumulation": 4},
    {"stage": 2, "accumulation": 4},
    {"stage": 3, "accumulation": 4},
    {"stage": 1, "accumulation": 4, "precision": "bf16"},
    {"stage": 2, "precision": "bf16"},
    {"stage": 3, "precision": "bf16"},
]
SAVED = [
    {"name": "zero1", "stage": 1},
    {"name": "zero3-bf16", "stage": 3, "precision": "bf16"},
    {"name": "zero1-bf16", "stage": 1, "precision": "bf16", "optimizer": "adamw"},
]
RESUMED = {
    1: [{"name": "to1", "source": "zero1", "stage": 1}],
    2: [
        {"name": "same", "source": "zero1", "stage": 1},
        {"name": "same3", "source": "zero3-bf16", "stage": 3, "precision": "bf16"},
        {
            "name": "same1",
            "source": "zero1-bf16",
            "stage": 1,
            "precision": "bf16",
            "optimizer": "adamw",
        },
    ],
    3: [
        {"name": "to1", "source": "zero1", "stage": 1, "only_load": True},
        {"name": "to3", "source": "zero1", "stage": 3, "only_load": True},
        {
            "name": "bf16to2",
            "source": "zero3-bf16",
            "stage": 2,
            "precision": "bf16",
            "only_load": True,
        },
    ],
    4: [
        {"name": "to2", "source": "zero1", "stage": 2},
        {"name": "to3", "source": "zero1", "stage": 3},
        {"name": "from3", "source": "zero3-bf16", "stage": 1, "precision": "bf16"},
    ],
}


ranks_module = load_module(Path(__file__).with_name("ranks.py"))
Found = dict[int, dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    results = {}
    for ranks in (2, 1, 3, 4):
        plan: dict[str, Any] = {
            "folder": str(folder),
            "cases": [case for case in MATRIX if case["ranks"] == ranks],
            "poisoned": POISONED if ranks == 2 else [],
            "save": SAVED if ranks == 2 else [],
            "resume": RESUMED[ranks],
        }
        results[ranks] = run_ranks(ranks_module.everything, ranks, plan, timeout_s=240)[0]
    return results


def relative_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Largest difference over tensors, each relative to its largest element."""
    assert one.keys() == other.keys()
    return max(
        float((one[key] - other[key]).abs().max() / other[key].abs().max().clamp(min=1e-12))
        for key in other
    )


@pytest.mark.parametrize("case", MATRIX, ids=lambda case: "-".join(map(str, case.values())))
def test_every_setting_equals_one_plain_process(found: Found, case: dict[str, Any]) -> None:
    index = [other for other in MATRIX if other["ranks"] == case["ranks"]].index(case)
    got = found[case["ranks"]]["cases"][index]
    expected = ranks_module.oracle(case)
    # The masters start as the fp32 weights, not as these rounded to bf16.
    assert got["start"].keys() == expected["start"].keys()
    assert all(torch.equal(got["start"][key], expected["start"][key]) for key in got["start"])
    first = {key: value for key, value in got["first"].items() if key.startswith("exp_avg/")}
    # The first gradient: the same fp32 (or bf16, then fp32) numbers summed in another order; some
    # hundred summands of relative error 6e-8 each stay below 1e-5 of the largest.
    assert relative_difference(first, expected["first"]) < 1e-5
    is_bf16 = case.get("precision") == "bf16"
    # Held-out loss in between, under ZeRO-3 with weights that are gathered for it.
    torch.testing.assert_close(
        got["evaluated"], expected["evaluated"], rtol=2e-3 if is_bf16 else 1e-5, atol=0
    )
    # Later steps start from weights that differ by the first step's rounding. fp32 differences
    # grow by atan's slope at most; in bf16 a last-bit difference of a master flips a rounding.
    loss_tolerance, norm_tolerance = (2e-3, 3e-2) if is_bf16 else (1e-5, 1e-4)
    for step, (ours, theirs) in enumerate(zip(got["results"], expected["results"], strict=True)):
        assert ours[2]
        tight = step == 0
        assert ours[0] == pytest.approx(theirs[0], rel=1e-6 if tight else loss_tolerance)
        assert ours[1] == pytest.approx(theirs[1], rel=1e-5 if tight else norm_tolerance)
    assert min(result[1] for result in got["results"]) > ranks_module.CLIP
    last = {key: value for key, value in got["last"].items() if key.startswith("master/")}
    moved = torch.cat([last[key] - expected["start"][key] for key in last])
    apart = torch.cat([last[key] - expected["last"][key] for key in last])
    # The three updates agree as vectors. Single elements may not: where a gradient is nearly zero
    # its sign, and so atan's, is rounding noise.
    assert float(apart.norm() / moved.norm()) < (0.1 if is_bf16 else 1e-2)


@pytest.mark.faults
@pytest.mark.parametrize("index", range(len(POISONED)), ids=lambda i: str(POISONED[i]))
def test_a_bad_number_on_one_rank_skips_the_step_on_all(found: Found, index: int) -> None:
    got = found[2]["poisoned"][index]
    applied = [result[2] for result in got["results"]]
    assert applied == [True, False, False, False, True]
    norms = [result[1] for result in got["results"]]
    assert [norm < float("inf") for norm in norms] == applied
    assert got["untouched"]
    assert got["goes_on"]
    assert got["steps"] == 2


@pytest.mark.faults
@pytest.mark.parametrize("index", range(len(RESUMED[2])), ids=lambda i: RESUMED[2][i]["name"])
def test_two_resumes_repeat_the_run_bit_by_bit(found: Found, index: int) -> None:
    saved, resumed = found[2]["saved"][index], found[2]["resumed"][index]
    assert resumed["state"] == {"rows": 32, "x": 0.1}
    assert resumed["results"] == saved["results"]
    assert resumed["last"].keys() == saved["last"].keys()
    for key, value in saved["last"].items():
        assert torch.equal(resumed["last"][key], value), key


@pytest.mark.parametrize(
    ("ranks", "index"),
    [(ranks, index) for ranks in RESUMED for index in range(len(RESUMED[ranks]))],
    ids=lambda value: str(value),
)
def test_any_topology_loads_the_same_bits(found: Found, ranks: int, index: int) -> None:
    case = RESUMED[ranks][index]
    source = [saved["name"] for saved in SAVED].index(case["source"])
    saved, resumed = found[2]["saved"][source], found[ranks]["resumed"][index]
    assert resumed["weights_match"]
    assert resumed["loaded"].keys() == saved["saved"].keys()
    for key, value in saved["saved"].items():
        assert torch.equal(resumed["loaded"][key], value), key
    is_bf16 = case.get("precision") == "bf16"
    # What remains of the run, unless it was only loaded (16 rows do not divide by 3 ranks).
    assert bool(resumed["results"]) != bool(case.get("only_load"))
    for ours, theirs in zip(resumed["results"], saved["results"], strict=False):
        assert ours[0] == pytest.approx(theirs[0], rel=2e-3 if is_bf16 else 1e-5)


@pytest.mark.usefixtures("found")
def test_one_process_reads_whole_weights(found: Found, folder: Path) -> None:
    for index, case in enumerate(SAVED):
        newest = newest_checkpoint(folder / case["name"])
        assert newest is not None
        assert read_state(newest) == {"rows": 32, "x": 0.1}
        weights = load_weights(newest)
        saved = found[2]["saved"][index]["saved"]
        assert len(weights) == sum(key.startswith("master/") for key in saved)
        for name, weight in weights.items():
            assert torch.equal(weight.flatten(), saved[f"master/{name}"])
