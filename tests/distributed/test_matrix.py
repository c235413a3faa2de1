"""Equal losses, gradients and weights on every engine setting; see docs/parity.md."""

import re
from pathlib import Path

import pytest

from pretrain.testing import load_module, run_ranks

MATRIX = load_module(Path(__file__).with_name("matrix.py"))


def check(cases: list[dict[str, object]], *, timeout_s: float) -> None:
    for case, (distance, invalidated) in zip(
        cases, MATRIX.measure(cases, timeout_s=timeout_s), strict=True
    ):
        limits = MATRIX.LIMITS[case["precision"]]
        above = {
            name: (value, limit)
            for name, value, limit in zip(distance._fields, distance, limits, strict=True)
            if not value <= limit
        }
        assert not above, f"{case}: {above}"
        assert invalidated == 0, f"{case}: {invalidated} traces"


def test_every_pair_of_settings_equals_one_plain_process() -> None:
    cases = MATRIX.pairwise(MATRIX.ALL)
    assert {case["stage"] for case in cases} == {1, 2, 3}
    check(cases, timeout_s=300)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_setting_equals_one_plain_process() -> None:
    check(MATRIX.ALL, timeout_s=1800)


def test_traces_that_are_thrown_away_would_be_seen() -> None:
    """Without the core as a leaf, depths that change from step to step invalidate the trace."""
    case = dict(zip(MATRIX.FIELDS, (1, 3, 1, 2, False, "step", "fp32", "reference"), strict=True))
    assert run_ranks(MATRIX.RANKS.without_leaf, 1, case)[0] > 0


def test_the_page_shows_all_cases_within_their_limits() -> None:
    page = MATRIX.PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| (\d) \| (\w+) \| \w+ \| (\d+) \| (.*) \|$", page, flags=re.M)
    assert sum(int(row[3]) for row in rows) == len(MATRIX.ALL) == 864
    for _, _, precision, _, cells in rows:
        limit = MATRIX.LIMITS[precision]
        allowed = (limit.gradient, limit.first_loss, limit.loss, limit.norm, limit.weights)
        assert all(float(c) <= a for c, a in zip(cells.split(" | "), allowed, strict=True))
    assert "away 0 times" in page
