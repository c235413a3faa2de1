"""Sums from text to scores, by the commands: places of digits are part of a run like all else."""

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.data.addition import items
from pretrain.testing import start_commands

SUMS = [
    "experiment=addition", "logging=quiet", "engine=zero1", "data.max_digits=4",
    "data.max_bytes=60_000", "data.build_workers=1", "data.loader_workers=0",
    "data.rows_per_member=8", "model.width=32", "model.heads=2", "model.inner=48",
    "model.context=32", "model.digit_positions=12", "depth.mean=3", "depth.backprop=2",
    "batch.global_tokens=256", "batch.micro_rows=2", "schedule.warmup_tokens=256",
    "schedule.cooldown_tokens=512", "validation.rows=4", "validation.depths=[1,3]",
    "checkpoint.every_steps=2", "run.steps=4",
]  # fmt: skip
# The same gradient in float32, by other routes: as between the paths in test_fused_run.
TOLERANCE = 1e-5


def run(folder: Path, *words: str, ranks: int = 1, code: int = 0) -> str:
    """A command as so many ranks; what rank 0 said."""
    output = folder / "said"
    for path in output.glob("*.txt"):
        path.unlink()
    processes = start_commands(ranks, list(words), cwd=folder, output=output)
    try:
        for process in processes:
            process.join(300)
    finally:
        for process in processes:
            process.kill()
    said = (output / "0.txt").read_text()
    assert [process.exitcode for process in processes] == [code] * ranks, said
    return said


def losses(folder: Path, name: str) -> dict[int, float]:
    lines = (folder / "out/runs" / name / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {record["step"]: record["loss/nats"] for record in records if "loss/nats" in record}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with shards of sums, and a run of four steps."""
    folder = tmp_path_factory.mktemp("sums")
    run(folder, "data", "tokenizer", *SUMS)
    run(folder, "data", "build", *SUMS)
    run(folder, "train", *SUMS, "run.name=whole")
    assert sorted(losses(folder, "whole")) == [1, 2, 3, 4]
    return folder


def test_a_resumed_run_shifts_places_as_a_whole_one(folder: Path) -> None:
    fall = "schedule.cooldown_tokens=0"
    run(folder, "train", *SUMS, "run.name=straight", fall)
    run(folder, "train", *SUMS, "run.name=parts", fall, "run.steps=2")
    run(folder, "train", "run.dir=out/runs/parts", "run.steps=4")
    assert losses(folder, "parts") == losses(folder, "straight")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_and_stages_change_nothing(folder: Path, stage: int) -> None:
    name = f"stage-{stage}"
    run(folder, "train", *SUMS, f"run.name={name}", f"engine.zero_stage={stage}", ranks=2)
    wanted = losses(folder, "whole")
    for step, loss in losses(folder, name).items():
        assert loss == pytest.approx(wanted[step], rel=TOLERANCE), step


def test_places_change_what_is_learned_but_not_the_stream(folder: Path) -> None:
    run(folder, "train", *SUMS, "run.name=none", "model.digit_positions=null")
    found, wanted = losses(folder, "none"), losses(folder, "whole")
    assert all(abs(found[step] - wanted[step]) > 10 * TOLERANCE for step in wanted)
    said = run(
        folder, "train", "run.dir=out/runs/whole", "model.digit_positions=13", "run.steps=5",
        code=64,
    )  # fmt: skip
    assert "model.digit_positions: 12 in the run folder, 13 asked for" in said


def test_a_replayed_step_has_the_shifts_that_it_had(folder: Path) -> None:
    run(folder, "replay", "run.dir=out/runs/whole", "step=3")
    (path,) = (folder / "out/runs/whole/replay").glob("*.json")
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    nats, labels = (sum(row[key] for row in rows) for key in ("nats", "labels"))
    assert nats / labels == pytest.approx(losses(folder, "whole")[3], rel=TOLERANCE)


def test_sums_are_asked_at_every_depth(folder: Path) -> None:
    records = items(5, 20, seed=1)
    (folder / "five.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run(
        folder, "evaluate", "run.dir=out/runs/whole", "evaluate.tasks=[five.jsonl]",
        "evaluate.depths=[1,2,5]",
    )  # fmt: skip
    found = folder / "out/runs/whole/evaluation/step-0000000004"
    for line, record in zip((found / "five.jsonl").read_text().splitlines(), records, strict=True):
        # a token for every digit, and one for the end of the line
        assert json.loads(line)["tokens"] == len(record["answer"])
    summary = json.loads((found / "five.json").read_text())
    assert (summary["kind"], summary["items"], summary["items_cut"]) == ("exact", 20, 0)
    assert list(summary["scores"]) == ["exact_match", "token_accuracy"]
    assert len(set(summary["scores"]["token_accuracy"]["value"])) > 1


def test_such_a_run_writes_but_has_no_published_form(folder: Path) -> None:
    said = run(
        folder, "generate", "run.dir=out/runs/whole", "generate.prompt='\"12+34=\"'",
        "generate.max_new_tokens=6", "generate.num_steps=3",
    )  # fmt: skip
    assert "12+34=" in said
    said = run(folder, "export", "run.dir=out/runs/whole", "export.to=published", code=64)
    assert "model.digit_positions=12 has no place in the published format" in said
    assert not (folder / "published").exists()
