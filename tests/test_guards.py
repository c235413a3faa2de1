"""A run in trouble, as people see it: dropped updates, replays, loss spikes, going back."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lives import Life

from conftest import SMALL, run_cli, weights_of
from pretrain.compose import load
from pretrain.data.store import open_manifest, train_order
from pretrain.engine import fragments
from pretrain.engine.commit import read_tags
from pretrain.engine.deepspeed import Engine
from pretrain.errors import CheckpointError
from pretrain.jobs.progress import read_progress
from pretrain.loop.lineage import read_lives
from pretrain.loop.passed_over import Rewind, append_rewind, read_rewinds, windows
from pretrain.preflight.machine import check_data
from pretrain.replay import weights_before
from pretrain.reporting.run import read_run
from pretrain.testing import start_commands

pytestmark = pytest.mark.faults


def read_records(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def diverged(workspace: Path) -> tuple[Path, str]:
    """A run whose first update is so large that every later loss is not finite."""
    done = run_cli(
        workspace, "train", *SMALL, "run.name=diverged", "run.steps=30", "optimizer.name=adamw",
        "optimizer=adamw", "optimizer.learning_rate=1e30", "schedule.warmup_tokens=0",
        "guards.stop_after_skips=3", "checkpoint.every_steps=10",
    )  # fmt: skip
    assert done.returncode == 70, done.stderr
    return workspace / "out/runs/diverged", done.stderr


def test_a_run_that_cannot_mend_itself_stops_and_says_what_to_do(
    diverged: tuple[Path, str],
) -> None:
    run_dir, said = diverged
    assert "DivergenceError: 3 steps in a row had no update, up to step 4" in said
    assert "Traceback" not in said
    steps = [record for record in read_records(run_dir) if "loss/nats" in record]
    assert [record["optimizer/skipped_updates"] for record in steps] == [0, 1, 2, 3]


def test_the_batch_of_a_dropped_update_is_replayed_with_its_own_weights(
    workspace: Path, diverged: tuple[Path, str]
) -> None:
    run_dir, _ = diverged
    assert (run_dir / "checkpoints/tags/skipped").read_text().strip() == "step-0000000002"
    done = run_cli(workspace, "replay", f"run.dir={run_dir}", "step=2")
    assert done.returncode == 0, done.stderr
    assert "which made no update" in done.stderr
    rows = json.loads((run_dir / "replay/step-0000000002.json").read_text())
    assert [row["row"] for row in rows] == list(range(16, 32))
    bad = [row["row"] for row in rows if row["nats"] in ("nan", "inf")]
    assert f"rows whose loss or gradient is not finite: {', '.join(map(str, bad))}" in done.stdout
    # a row that was replayed alone is the same row
    alone = run_cli(workspace, "replay", f"run.dir={run_dir}", "step=2", "rows=[20]")
    assert alone.returncode == 0, alone.stderr
    assert json.loads((run_dir / "replay/step-0000000002.json").read_text()) == [rows[4]]


def test_a_replay_gives_the_loss_that_was_recorded(workspace: Path) -> None:
    done = run_cli(workspace, "train", *SMALL, "run.name=replayed", "checkpoint.keep_last=9")
    assert done.returncode == 0, done.stderr
    run_dir = workspace / "out/runs/replayed"
    done = run_cli(workspace, "replay", f"run.dir={run_dir}", "step=5")
    assert done.returncode == 0, done.stderr
    rows = json.loads((run_dir / "replay/step-0000000005.json").read_text())
    (recorded,) = [r for r in read_records(run_dir) if r["step"] == 5 and "loss/nats" in r]
    loss = sum(row["nats"] for row in rows) / sum(row["labels"] for row in rows)
    # fp32, rows alone instead of four together: sums of 32 in another order
    assert loss == pytest.approx(recorded["loss/nats"], rel=1e-5)
    for wrong, said in (("step=99", "has no step 99"), ("step=0", "must be at least 1")):
        done = run_cli(workspace, "replay", f"run.dir={run_dir}", wrong)
        assert done.returncode in (64, 65)
        assert said in done.stderr
    done = run_cli(workspace, "replay", f"run.dir={run_dir}", "step=5", "rows=[3]")
    assert done.returncode == 64
    assert "it had rows 64 to 79" in done.stderr


def test_a_replay_takes_the_nearest_weights_that_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        weights_before(tmp_path, 100)
    for step in (320, 400):
        folder = tmp_path / f"checkpoints/step-{step:010d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text('{"train": {"skipped_in_a_row": 0}}')
    said = {
        100: (320, "221 updates after the step began"),
        320: (320, "1 update after the step began"),
        321: (320, ""),
        400: (320, "79 updates before the step"),
        402: (400, "1 update before the step"),
    }
    for step, (nearest, warning) in said.items():
        caplog.clear()
        assert weights_before(tmp_path, step) == nearest
        assert caplog.text.count("WARNING") == bool(warning)
        assert warning in caplog.text


def spoil_last_gradient() -> None:
    """In the process of a run, before it starts: NaN in one micro-batch of one rank, at step 3."""
    backward, calls = Engine.backward, 0

    def spoilt(engine: Engine, nats: Any, *, scale: float) -> None:
        nonlocal calls
        calls += 1
        is_it = calls == 3 * engine.micro_steps - 1 and engine.world.rank == 1
        backward(engine, nats, scale=math.nan if is_it else scale)

    Engine.backward = spoilt  # type: ignore[method-assign]


def test_a_run_whose_last_step_had_no_update_has_not_ended_well(workspace: Path) -> None:
    """Its weights are good all the same, so they are saved; and more steps go on from them."""
    three = ["run.steps=3", "checkpoint.every_steps=9"]
    with Life(workspace, "spoilt", *three, ranks=2, before=spoil_last_gradient) as life:
        assert life.wait() == [70, 70], life.said()
    wrong = "3, but step 3 had no update, because loss or gradient were not finite"
    for rank in (0, 1):
        assert wrong in life.said(rank)
    assert "WARNING pretrain.loop.record: non-finite at step 3: loss 6" in life.said(0)
    assert "Traceback" not in life.said()
    assert read_run(life.run_dir).state == "DivergenceError"
    progress = read_progress(life.run_dir)
    assert (progress.has_all_steps, progress.is_finished) == (True, False)
    assert "the weights are those of step 2" in progress.trouble
    # nor has it when somebody looks again
    again = run_cli(workspace, "train", f"run.dir={life.run_dir}")
    assert again.returncode == 70, again.stderr
    assert wrong in again.stderr
    submitted = run_cli(workspace, "submit", f"run.dir={life.run_dir}", "submit.to=host")
    assert f"{life.run_dir} has all its 3 steps, but step 3 had no update" in submitted.stdout
    assert len(read_lives(life.run_dir)) == 1
    more = run_cli(workspace, "train", f"run.dir={life.run_dir}", "run.steps=4")
    assert more.returncode == 0, more.stderr
    assert [r["optimizer/skipped_updates"] for r in read_records(life.run_dir)
            if "loss/nats" in r] == [0, 0, 1, 1]  # fmt: skip
    assert read_progress(life.run_dir).is_finished


def test_a_run_that_ends_with_weights_of_no_use_has_not_ended_well(workspace: Path) -> None:
    """The first update spoils them, and there is no second step to find it."""
    done = run_cli(
        workspace, "train", *SMALL, "run.name=spoilt-at-once", "run.steps=1", "optimizer=adamw",
        "optimizer.learning_rate=1e30", "schedule.warmup_tokens=0",
    )  # fmt: skip
    assert done.returncode == 70, done.stderr
    assert "its weights are of no use and are not saved: their held-out loss is nan" in done.stderr
    assert "Traceback" not in done.stderr
    run_dir = workspace / "out/runs/spoilt-at-once"
    assert read_run(run_dir).state == "DivergenceError"
    assert not (run_dir / "checkpoints").exists()


# Every second loss or so is above the median: what counts as a spike here is ordinary noise.
NERVOUS = [
    "guards.spike.window_steps=8", "guards.spike.alert_score=0.02", "guards.spike.skip_score=0.5",
    "guards.spike.rewind_after=2", "guards.spike.max_rewinds=9", "run.steps=24",
    "schedule.warmup_tokens=0", "optimizer.learning_rate=1e-4", "validation.every_steps=100",
    "guards.save_on_skip=false", "checkpoint.every_steps=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def nervous(workspace: Path) -> Path:
    done = run_cli(workspace, "train", *SMALL, *NERVOUS, "run.name=nervous")
    assert done.returncode == 0, done.stderr
    assert "were loss spikes: back to step" in done.stderr
    return workspace / "out/runs/nervous"


def windows_of(run_dir: Path) -> list[dict[str, int]]:
    return [json.loads(line) for line in (run_dir / "rewinds.jsonl").read_text().splitlines()]


def test_a_run_goes_back_and_past_the_rows_of_a_spike(nervous: Path) -> None:
    windows = windows_of(nervous)
    assert windows
    steps = [record for record in read_records(nervous) if "loss/nats" in record]
    assert [record["step"] for record in steps] == list(range(1, 25))
    passed_over = {row for w in windows for row in range(w["first_row"], w["next_row"])}
    row = 0
    for record in steps:
        while row in passed_over:
            row += 16
        assert record["data/first_row"] == row
        row += 16
    for window in windows:
        assert window["to_step"] % 3 == 0
        assert window["next_row"] - window["first_row"] >= 32
    # what was taken back is kept beside the record
    discarded = read_records(nervous, "metrics.discarded.jsonl")
    assert {window["from_step"] for window in windows} <= {record["step"] for record in discarded}


@pytest.mark.parametrize("passed", [(), (144, 176)], ids=["reached", "passed-over"])
def test_losses_of_another_mixture_are_not_compared(
    workspace: Path, passed: tuple[int, ...]
) -> None:
    """It begins at row 160, which a run that has gone back over it may never see."""
    name = f"mixture-{len(passed)}"
    run_dir = workspace / "out/runs" / name
    run_dir.mkdir(parents=True)
    if passed:
        append_rewind(run_dir, Rewind(11, 9, *passed))
    sources = "+data.sources={prose: {weight: 1}, sums: {weight: 1}}"
    milestones = f"data.milestones=[{{from_tokens: {160 * 32}, weights: {{prose: 0, sums: 1}}}}]"
    done = run_cli(
        workspace, "train", *SMALL, f"run.name={name}", "run.steps=20", sources, milestones,
        "guards.spike.window_steps=8", "validation.every_steps=99", "checkpoint.every_steps=99",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    scores = {
        record["data/first_row"]: record["loss/spike_score"]
        for record in read_records(run_dir) if "loss/nats" in record
    }  # fmt: skip
    first = 176 if passed else 160
    assert [row for row, score in scores.items() if score == 0] == [
        *range(0, 128, 16), *range(first, first + 128, 16),
    ]  # fmt: skip


def test_rows_that_were_passed_over_count_for_no_epoch_when_a_run_resumes(
    workspace: Path, nervous: Path
) -> None:
    """The life that goes back is not stopped by its limit, so no later one may be."""
    config = load("train", [f"data.shards={workspace}/out/data/small-tiny", *SMALL])
    order = train_order(config.data, open_manifest(config.data), config.run.seed)
    passed = sum(behind - first for first, behind in windows(read_rewinds(nervous), before=9999))
    # as much as the steps read, and no more than a few rows for the place in the mixture
    limit = order.epochs(24 * 16 + 32)[0]
    assert order.epochs(24 * 16 + passed)[0] > limit
    sources = f"+data.sources={{prose: {{max_epochs: {limit}}}, sums: {{}}}}"
    limited = ["train", *SMALL, *NERVOUS, sources, "run.name=nervous-limited"]
    done = run_cli(workspace, *limited, "run.steps=23")
    assert done.returncode == 0, done.stderr
    done = run_cli(workspace, *limited)
    assert done.returncode == 0, done.stderr
    assert windows_of(nervous.with_name("nervous-limited"))


def test_a_run_that_is_killed_around_its_rewinds_ends_the_same(
    workspace: Path, nervous: Path
) -> None:
    name = "nervous-killed"
    run_dir = workspace / "out/runs" / name
    for lines in (10, 16, 22, 28):
        kill_when(workspace, run_dir, name, lines)
    done = run_cli(workspace, "train", *SMALL, *NERVOUS, f"run.name={name}")
    assert done.returncode == 0, done.stderr
    assert windows_of(run_dir) == windows_of(nervous)
    assert losses_of(run_dir) == losses_of(nervous)
    assert weights_of(run_dir, 24) == weights_of(nervous, 24)


def kill_when(workspace: Path, run_dir: Path, name: str, lines: int) -> None:
    """Start the run, and kill it once its two records have so many lines together."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pretrain", "train", *SMALL, *NERVOUS, f"run.name={name}"],
        cwd=workspace, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    try:
        while process.poll() is None and time.monotonic() < deadline:
            paths = run_dir.glob("metrics*.jsonl")
            if sum(path.read_bytes().count(b"\n") for path in paths) >= lines:
                break
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()


def losses_of(run_dir: Path) -> dict[int, float]:
    return {r["step"]: r["loss/nats"] for r in read_records(run_dir) if "loss/nats" in r}


def write_slowly() -> None:
    """In the process of a run, before it starts: no file of a checkpoint is there at once."""
    write_pieces = fragments.write_pieces

    def late(*args: Any) -> Any:
        time.sleep(0.5)
        return write_pieces(*args)

    fragments.write_pieces = late


def test_where_a_run_goes_back_to_does_not_depend_on_the_disk(
    workspace: Path, nervous: Path
) -> None:
    words = ["train", *SMALL, *NERVOUS, "run.name=slow-disk"]
    output = workspace / "said/slow-disk"
    (process,) = start_commands(1, words, cwd=workspace, output=output, before=write_slowly)
    process.join(400)
    process.kill()
    assert process.exitcode == 0, (output / "0.txt").read_text()
    assert windows_of(nervous.with_name("slow-disk")) == windows_of(nervous)


def test_a_checkpoint_that_is_there_may_be_tagged_later(workspace: Path) -> None:
    """Steps 2 and 4 are saved; the life that goes on is asked to keep 2 and 3, and then 4."""
    run_dir = workspace / "out/runs/tagged-later"
    done = run_cli(workspace, "train", *SMALL, "run.name=tagged-later", "run.steps=4")
    assert done.returncode == 0, done.stderr
    later = ["train", f"run.dir={run_dir}", "run.steps=8", "checkpoint.keep_last=1"]
    done = run_cli(workspace, *later, "+checkpoint.tags.good=2", "+checkpoint.tags.lost=3")
    assert done.returncode == 0, done.stderr
    wrong = (
        "checkpoint.tags.lost=3 keeps nothing: the run is at step 4, and has checkpoints of 4, 2"
    )
    assert wrong in done.stderr
    assert "checkpoint.tags=" not in done.stderr
    saved = sorted(path.name[-1] for path in (run_dir / "checkpoints").glob("step-*"))
    assert saved == ["2", "8"]
    # as a life leaves it that dies between a save and its tag: the run goes on from there
    (run_dir / "checkpoints/tags/good").unlink()
    done = run_cli(workspace, *later, "+checkpoint.tags.last=8")
    assert done.returncode == 0, done.stderr
    assert read_tags(run_dir) == {"last": 8}


def test_a_tag_that_a_submission_brings_is_as_new_as_one_of_the_command_line(
    workspace: Path,
) -> None:
    """It stands in config.yaml before the life that has to write it begins."""
    run_dir = workspace / "out/runs/tagged-from-afar"
    done = run_cli(workspace, "train", *SMALL, f"run.dir={run_dir}", "run.steps=4")
    assert done.returncode == 0, done.stderr
    done = run_cli(
        workspace, "submit", f"run.dir={run_dir}", "submit.to=host", "run.steps=6",
        "+checkpoint.tags.good=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_tags(run_dir) == {"good": 2}


EVERY_STEP = {
    "due": ["checkpoint.every_steps=1"],
    "tagged": [f"+checkpoint.tags.of_{step}={step}" for step in range(1, 25)],
}


@pytest.mark.parametrize("why", EVERY_STEP)
def test_a_step_that_is_taken_again_is_saved_again(workspace: Path, why: str) -> None:
    """Going back deletes what was saved among the spikes, here the first of two."""
    done = run_cli(
        workspace, "train", *SMALL, *NERVOUS, "checkpoint.every_steps=100", *EVERY_STEP[why],
        f"run.name=again-{why}", "checkpoint.keep_last=24", "checkpoint.asynchronous=false",
        "guards.spike.max_rewinds=99",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run_dir = workspace / f"out/runs/again-{why}"
    assert windows_of(run_dir)
    assert "it was saved during the spike" in done.stderr
    saved = sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))
    assert saved == [f"step-{step:010d}" for step in range(1, 25)]


def test_saves_among_spikes_leave_the_checkpoint_to_go_back_to(workspace: Path) -> None:
    """Each save would otherwise delete the one before it, the first bad one the last good one."""
    done = run_cli(
        workspace, "train", *SMALL, *NERVOUS, "run.name=few", "checkpoint.keep_last=1",
        "checkpoint.every_steps=1", "checkpoint.asynchronous=false", "guards.spike.max_rewinds=99",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "there is no checkpoint from before" not in done.stderr
    run_dir = workspace / "out/runs/few"
    assert windows_of(run_dir)
    for window in windows_of(run_dir):
        assert window["from_step"] - window["to_step"] == 2
    # a second one if the last step is bad
    left = [path.name for path in (run_dir / "checkpoints").glob("step-*")]
    assert "step-0000000024" in left
    assert len(left) <= 2


def test_a_run_that_cannot_go_back_saves_what_is_due(workspace: Path) -> None:
    """The first checkpoint is due in the very step in which the run would go back."""
    done = run_cli(
        workspace, "train", *SMALL, *NERVOUS, "run.name=nowhere", "run.steps=12",
        "checkpoint.every_steps=11", "validation.every_steps=11",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "steps 10 to 11 are loss spikes, and there is no checkpoint from before" in done.stderr
    assert "validation at step 11" in done.stderr
    saved = (workspace / "out/runs/nowhere/checkpoints").glob("step-*")
    assert sorted(path.name[-2:] for path in saved) == ["11", "12"]


def test_a_run_that_keeps_going_back_stops(workspace: Path) -> None:
    done = run_cli(
        workspace, "train", *SMALL, *NERVOUS, "run.name=lost", "guards.spike.max_rewinds=1",
        "run.steps=300", "guards.spike.alert_score=0.001",
    )  # fmt: skip
    assert done.returncode == 70, done.stderr
    assert "has gone back 1 times already (guards.spike.max_rewinds)" in done.stderr
    assert "Traceback" not in done.stderr


def test_damaged_rewinds_are_refused_by_every_rank_before_anything_changes(
    workspace: Path,
) -> None:
    run_dir = workspace / "out/runs/torn"
    run_dir.mkdir(parents=True)
    (run_dir / "rewinds.jsonl").write_bytes(bytes(range(256)))
    with Life(workspace, "torn", ranks=2) as life:
        assert life.wait() == [65, 65], life.said()
    assert "rewinds.jsonl is damaged" in life.said(0)
    assert "Traceback" not in life.said()
    assert not (run_dir / "config.yaml").exists()


def test_epochs_are_those_of_the_rows_that_the_run_reads(workspace: Path, monkeypatch) -> None:
    """Not of its steps times their size now: 64 rows and one step of 32 here, not 5 x 32."""
    config = load("train", [f"data.shards={workspace}/out/data/small-tiny", *SMALL])
    manifest = open_manifest(config.data)
    order = train_order(config.data, manifest, config.run.seed)
    limit = order.epochs(120)[0]
    sources = f"+data.sources={{prose: {{max_epochs: {limit}}}, sums: {{}}}}"
    done = run_cli(workspace, "train", *SMALL, "run.name=epochs", sources, "run.steps=4")
    assert done.returncode == 0, done.stderr
    larger = ["batch.global_tokens=1024", "batch.micro_rows=8"]
    done = run_cli(workspace, "train", "run.dir=out/runs/epochs", "run.steps=5", *larger)
    assert done.returncode == 0, done.stderr
    done = run_cli(workspace, "train", "run.dir=out/runs/epochs", "run.steps=7", *larger)
    assert done.returncode == 64
    assert "but 160 rows of this mixture read its" in done.stderr
    # and so say the commands that look ahead, unless their shards are others
    others = workspace / "other-shards"
    shutil.copytree(workspace / "out/data/small-tiny", others)
    manifest_file = others / "manifest.json"
    manifest_file.write_bytes(replace(manifest, tool="another build").to_bytes())
    done = run_cli(workspace, "data", "inspect", "run.dir=out/runs/epochs", f"data.shards={others}")
    assert "Mixture of 160 rows " in done.stdout, done.stderr
    for steps, rows in ((5, 96), (7, 160)):
        overrides = ["run.dir=out/runs/epochs", f"run.steps={steps}"]
        done = run_cli(workspace, "data", "inspect", *overrides)
        assert f"Mixture of {rows} rows, 96 of them so far " in done.stdout, done.stderr
        with monkeypatch.context() as patch:
            patch.chdir(workspace)
            config = load("doctor", overrides, resumes=True)
            *_, shards = check_data(config)
        tokens = sum(source.totals("train").tokens for source in manifest.sources)
        assert f"the run reads {rows * 32 / tokens:,.2f} times as many" in shards.detail


def test_another_batch_size_goes_on_from_the_consumed_rows(workspace: Path) -> None:
    name = "batches"
    run_dir = workspace / "out/runs" / name
    length = ["run.steps=null", f"run.tokens={8 * 512}"]
    done = run_cli(workspace, "train", *SMALL, f"run.name={name}", *length,
                   "optimizer.learning_rate=1e-3", "run.tokens=2048")  # fmt: skip
    assert done.returncode == 0, done.stderr
    larger = ["batch.global_tokens=1024", "batch.micro_rows=8"]
    done = run_cli(workspace, "train", f"run.dir={run_dir}", *length, *larger)
    assert done.returncode == 0, done.stderr
    assert "resuming with batch.global_tokens=1024 (was 512)" in done.stderr
    steps = [record for record in read_records(run_dir) if "loss/nats" in record]
    assert [record["data/first_row"] for record in steps] == [0, 16, 32, 48, 64, 96]
    assert [record["data/rows"] for record in steps] == [16] * 4 + [32] * 2
    assert [record["tokens"] for record in steps] == [512, 1024, 1536, 2048, 3072, 4096]
    # the same rows, whatever the steps that they come in
    done = run_cli(workspace, "train", *SMALL, "run.name=batches-whole", "run.steps=8")
    assert done.returncode == 0, done.stderr
    whole = [r for r in read_records(run_dir.with_name("batches-whole")) if "loss/nats" in r]
    for index, pair in ((4, (4, 5)), (5, (6, 7))):
        assert steps[index]["data/checksum"] == sum(whole[i]["data/checksum"] for i in pair)
