"""The parity matrix: its cases, how far each is from one plain process, and its table.

`python tests/distributed/matrix.py` measures all of them and writes docs/parity.md.
"""

from collections.abc import Iterable
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.testing import load_module, run_ranks

RANKS = load_module(Path(__file__).with_name("matrix_ranks.py"))
PAGE = Path(__file__).parents[2] / "docs/parity.md"
FIELDS = (
    "ranks", "stage", "accumulation", "micro_rows", "checkpointed", "scope", "precision", "path",
)  # fmt: skip
VALUES = (
    (1, 2, 4), (1, 2, 3), (1, 4), (1, 2), (False, True), ("row", "block", "step"),
    ("fp32", "bf16"), ("reference", "fused"),
)  # fmt: skip
ALL = [dict(zip(FIELDS, values, strict=True)) for values in product(*VALUES)]
Case = dict[str, Any]


class Distance(NamedTuple):
    """Of a case from one plain process; relative."""

    gradient: float
    """First gradient: largest difference of an element over the largest element of its tensor."""
    first_loss: float
    first_norm: float
    loss: float
    """Largest of the later steps."""
    norm: float
    weights: float
    """After three steps: difference over the way that the weights have gone, as vectors."""


# First step: the same numbers (bf16 ones, then fp32) summed in another order; some hundred fp32
# summands of relative error 6e-8. Later steps start from weights that differ by that rounding:
# fp32 differences grow by the slope of atan at most, and in bf16 a last-bit difference of a master
# may flip the rounding of a weight, 4e-3 of it. Elements whose gradient is nearly zero may move
# either way, so the weights are compared as vectors.
LIMITS = {
    "fp32": Distance(1e-5, 1e-6, 1e-5, 1e-5, 1e-4, 1e-2),
    "bf16": Distance(1e-5, 1e-6, 1e-5, 2e-3, 3e-2, 0.1),
}


def pairwise(cases: list[Case]) -> list[Case]:
    """Few cases in which every pair of values of two fields occurs, chosen greedily."""
    missing = {pair for case in cases for pair in _pairs(case)}
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(missing & _pairs(case)))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def _pairs(case: Case) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    items = list(case.items())
    return {(one, other) for i, one in enumerate(items) for other in items[i + 1 :]}


def measure(cases: list[Case], *, timeout_s: float = 240) -> list[tuple[Distance, float]]:
    """Distance of each case, and how often DeepSpeed threw a trace away; one start per ranks."""
    found: dict[str, tuple[Distance, float]] = {}
    for ranks in sorted({case["ranks"] for case in cases}):
        own = [case for case in cases if case["ranks"] == ranks]
        results = run_ranks(RANKS.run_cases, ranks, own, timeout_s=timeout_s)[0]
        for case, got in zip(own, results, strict=True):
            found[str(case)] = (_distance(got, _oracle(case)), got["invalidated"])
    return [found[str(case)] for case in cases]


def _oracle(case: Case) -> dict[str, Any]:
    """Which neither the stage nor checkpointing changes.

    The oracle computes on the same path: tests/model/fused compares the paths.
    """
    same = tuple(
        case[field]
        for field in ("ranks", "accumulation", "micro_rows", "scope", "precision", "path")
    )
    return _oracle_of(*same)


@lru_cache(maxsize=128)
def _oracle_of(
    ranks: int, accumulation: int, micro_rows: int, scope: str, precision: str, path: str
) -> dict[str, Any]:
    values = (ranks, 1, accumulation, micro_rows, False, scope, precision, path)
    found: dict[str, Any] = RANKS.oracle(dict(zip(FIELDS, values, strict=True)))
    return found


def _distance(got: dict[str, Any], expected: dict[str, Any]) -> Distance:
    losses, norms = (
        [abs(a[i] - b[i]) / b[i] for a, b in zip(got["results"], expected["results"], strict=True)]
        for i in (0, 1)
    )
    moved = sum(float((got["last"][n] - p).square().sum()) for n, p in expected["start"].items())
    apart = sum(float((got["last"][n] - p).square().sum()) for n, p in expected["last"].items())
    gradient = max(
        float((got["first"][name] - first).abs().max() / first.abs().max().clamp(min=1e-12))
        for name, first in expected["first"].items()
    )
    return Distance(
        gradient, losses[0], norms[0], max(losses[1:]), max(norms[1:]), (apart / moved) ** 0.5
    )


def render(cases: list[Case], distances: Iterable[Distance]) -> str:
    """A row for each stage, number of ranks and precision: the worst over the other fields."""
    lines = [
        "| ZeRO | ranks | precision | path | cases | first gradient | first loss | loss | "
        "gradient norm | weights |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[int, int, str, str], list[Distance]] = {}
    for case, distance in zip(cases, distances, strict=True):
        key = (case["stage"], case["ranks"], case["precision"], case["path"])
        groups.setdefault(key, []).append(distance)
    for (stage, ranks, precision, path), members in sorted(groups.items()):
        worst = Distance(*(max(column) for column in zip(*members, strict=True)))
        shown = (worst.gradient, worst.first_loss, worst.loss, worst.norm, worst.weights)
        cells = " | ".join(f"{value:.1e}" for value in shown)
        lines.append(f"| {stage} | {ranks} | {precision} | {path} | {len(members)} | {cells} |")
    for precision, limit in LIMITS.items():
        shown = (limit.gradient, limit.first_loss, limit.loss, limit.norm, limit.weights)
        cells = " | ".join(f"{value:.0e}" for value in shown)
        lines.append(f"| | | {precision} | | allowed | {cells} |")
    return "\n".join(lines)


INTRODUCTION = """# Parity: the same mathematics on every engine setting

Three optimizer steps of a small model through DeepSpeed on real processes (gloo), against the
same steps by one plain process without DeepSpeed: {cases} cases, all of ZeRO 1, 2, 3 x ranks 1, 2,
4 x accumulation 1, 4 x micro-batches of 1, 2 rows x activations kept, recomputed x depth scope
row, block, step x fp32, bf16 x plain modules, fused passes (on a CPU their plain kernels).
Rows, depths and their order are those of the training loop: ranks differ in depth (scope row and
block) and run their deepest rows first. Each number is the worst relative difference in
its row of the table. Under ZeRO-3 DeepSpeed threw its trace of
modules away {invalidated} times.

The limits are derived in `tests/distributed/matrix.py`, which also writes this page
(`python tests/distributed/matrix.py`); `make test` runs a part in which every pair of settings
occurs, `make test-all` all of it.

"""


def main() -> None:
    """Measure everything and write the page."""
    measured = measure(ALL, timeout_s=1800)
    invalidated = sum(count for _, count in measured)
    table = render(ALL, [distance for distance, _ in measured])
    introduction = INTRODUCTION.format(cases=len(ALL), invalidated=int(invalidated))
    PAGE.write_text(introduction + table + "\n", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
