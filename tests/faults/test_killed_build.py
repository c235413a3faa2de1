"""A build that is killed at any moment is taken up again, and gives the same bytes."""

import contextlib
import hashlib
import os
import random
import time
from pathlib import Path

import pytest
from lives import row

from conftest import SMALL
from pretrain.testing import start_commands

pytestmark = pytest.mark.faults
KILLS = 6


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def run(workspace: Path, tmp_path: Path, command: str, *, kill_after_s: float | None) -> float:
    """One life of a data command; how long it took, or 0 if it was killed."""
    started = time.monotonic()
    (process,) = start_commands(
        1,
        ["data", command, *SMALL, f"data.shards={tmp_path}/shards",
         f"tokenizer.path={tmp_path}/tokenizer", "data.build_workers=2"],
        cwd=workspace,
        output=tmp_path / "said",
    )  # fmt: skip
    process.join(240 if kill_after_s is None else kill_after_s)
    if process.is_alive():
        process.kill()
        process.join()
        return 0.0
    assert process.exitcode == 0, (tmp_path / "said/0.txt").read_text()
    return time.monotonic() - started


@row(
    "up to 24 kills at random moments of `data tokenizer` and `data build`",
    "the next life goes on; the same bytes in the end",
)
def test_kills_during_tokenizer_and_build_change_no_byte(workspace: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    # the first life is not measured: it also starts the server that forks all of them
    for folder in (tmp_path / "first", whole):
        lasts = {c: run(workspace, folder, c, kill_after_s=None) for c in ("tokenizer", "build")}
    draw, killed = random.Random(0), 0
    for number in range(KILLS):
        folder = tmp_path / str(number)
        for command, seconds in list(lasts.items()):
            for is_first in (True, False):
                took_s = run(workspace, folder, command, kill_after_s=draw.uniform(0.1, seconds))
                if not took_s:
                    killed += 1
                    continue
                if is_first:
                    # faster than the life that was measured: the machine was busier then
                    lasts[command] = took_s
                break
            run(workspace, folder, command, kill_after_s=None)
        for name in ("tokenizer", "shards"):
            assert hashes(folder / name) == hashes(whole / name)
    assert killed >= KILLS
    deadline = time.monotonic() + 120
    while (left := who_writes_below(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


def who_writes_below(folder: Path) -> list[str]:
    """Processes whose output goes to a file there."""
    found = []
    for output in Path("/proc").glob("[0-9]*/fd/1"):
        # what has ended meanwhile, and what is another's
        with contextlib.suppress(OSError):
            if Path(os.readlink(output)).is_relative_to(folder):
                found.append(output.parts[2])
    return found
