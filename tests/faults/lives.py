"""Lives of a real run: started cheaply, stopped in any way, and judged by what they leave."""

import json
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from conftest import SMALL
from pretrain.engine import commit
from pretrain.testing import start_commands

Test = TypeVar("Test", bound=Callable[..., None])
# Long enough to be caught in it, and rows of a step that one, two and three ranks can share.
STEPS = 30
SETTING = [*SMALL, "batch.global_tokens=384", "batch.micro_rows=2", f"run.steps={STEPS}"]
# Ranks that are left alone end by themselves within this time, or a launcher ends them.
GRACE_S = 5.0
STEADY = ("loss/nats", "gradient/norm", "optimizer/learning_rate", "data/checksum", "depth/mean",
          "data/first_row", "tokens")  # fmt: skip


class Life:
    """One life of a run on some ranks; leaving the block ends what is left of it."""

    def __init__(
        self,
        workspace: Path,
        name: str,
        *overrides: str,
        ranks: int = 1,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.run_dir = workspace / "out/runs" / name
        self.output = workspace / "said" / name
        self.processes = start_commands(
            ranks,
            ["train", *SETTING, f"run.name={name}", *overrides],
            cwd=workspace,
            output=self.output,
            before=before,
        )

    def __enter__(self) -> "Life":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def wait(self, timeout_s: float = 240.0) -> list[int]:
        """Exit codes, by rank; a signal's number is negative. Fails if one does not end."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        assert None not in codes, f"not ended after {timeout_s} s: {codes}\n{self.said()}"
        return [int(code) for code in codes if code is not None]

    def until(self, condition: Callable[[], bool], timeout_s: float = 240.0) -> None:
        """Wait for something that the run must do while it lives."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert any(process.is_alive() for process in self.processes), self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.005)

    def has_step(self, step: int) -> bool:
        """Whether the record has a step."""
        return step in read_steps(self.run_dir)

    def said(self, rank: int | None = None) -> str:
        """What the ranks, or one of them, have said on the console in all lives."""
        wanted = "*" if rank is None else str(rank)
        return "\n".join(path.read_text() for path in sorted(self.output.glob(f"{wanted}.txt")))


def row(done: str, observed: str, lost: str = "nothing") -> Callable[[Test], Test]:
    """What a test does, sees and finds lost: a row of the table in docs/reliability.md."""

    def decorate(test: Test) -> Test:
        test.row = (done, observed, lost)  # type: ignore[attr-defined]
        return test

    return decorate


def some(names: Iterable[str], kept: Collection[str]) -> list[Any]:
    """All as parameters of a test; those that are not kept run with the slow ones."""
    return [name if name in kept else pytest.param(name, marks=pytest.mark.slow) for name in names]


def finish(
    workspace: Path,
    name: str,
    *overrides: str,
    ranks: int = 1,
    timeout_s: float = 240.0,
    before: Callable[[], None] | None = None,
) -> Path:
    """The last life of a run: to its end."""
    with Life(workspace, name, *overrides, ranks=ranks, before=before) as life:
        codes = life.wait(timeout_s)
        assert codes == [0] * ranks, life.said()
    return life.run_dir


def read_steps(run_dir: Path) -> dict[int, list[Any]]:
    """What every life must agree on, by step; each step once."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    steps = [record for record in records if "loss/nats" in record]
    found = {record["step"]: [record[key] for key in STEADY] for record in steps}
    assert len(found) == len(steps), f"a step twice in {path}"
    return found


def weights_of(run_dir: Path) -> list[tuple[str, str]]:
    """Hash of every file of weights and moments of the checkpoint that `latest` names."""
    folder = run_dir / "checkpoints" / (run_dir / "checkpoints/latest").read_text().strip()
    assert commit.find_damage(folder) == ""
    return sorted(
        (name, entry["sha256"])
        for name, entry in commit.read_manifest(folder)["files"].items()
        if name.endswith(".safetensors")
    )


def leftovers(run_dir: Path) -> list[str]:
    """Files of a finished run that nobody should find."""
    return [
        str(path.relative_to(run_dir))
        for path in run_dir.rglob("*")
        if ".tmp-" in path.name or ".partial" in path.name or ".deleting" in path.name
        or path.name == "lock.json"
    ]  # fmt: skip


def check_same(run_dir: Path, whole: Path) -> None:
    """A run that was disturbed has ended as the one that was not."""
    assert read_steps(run_dir) == read_steps(whole)
    assert weights_of(run_dir) == weights_of(whole)
    assert leftovers(run_dir) == []
