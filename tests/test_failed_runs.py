"""The presets of the failed runs compose, shrink and train; their alarms live through a resume."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from conftest import SMALL, run_cli
from pretrain.compose import load
from pretrain.model.config import Block, ComputePath, Injection


def test_the_first_failed_run_is_the_published_one_but_for_its_choices() -> None:
    config, huginn = (
        load("train", [f"experiment={name}"]) for name in ("failed-run-1", "huginn-3.5b")
    )
    model = config.model
    assert (model.norm_gain, model.embedding_scale, model.qk_bias) == (False, False, False)
    assert (model.injection, model.block) == (Injection.add, Block.sandwich)
    assert config.optimizer.learning_rate == 4e-4
    assert (model.width, config.depth, config.batch, config.total_tokens) == (
        5280, huginn.depth, huginn.batch, huginn.total_tokens,
    )  # fmt: skip


def test_the_second_failed_run_has_learned_parts_but_nothing_bounds_its_sum() -> None:
    config, huginn = (
        load("train", [f"experiment={name}"]) for name in ("failed-run-2", "huginn-3.5b")
    )
    assert config.model.block is Block.pre_norm
    # which the fused path is not written for
    assert config.model.path is ComputePath.reference
    config.model.block, config.model.path = Block.sandwich, huginn.model.path
    assert (config.model, config.optimizer) == (huginn.model, huginn.optimizer)


def test_debug_tiny_shrinks_any_experiment_to_the_tiny_preset() -> None:
    tiny = load("train", [])
    for name in ("failed-run-1", "failed-run-2", "huginn-100m"):
        config = load("train", [f"experiment={name}", "debug=tiny"])
        assert config.model.width == tiny.model.width == 128
        assert (config.data, config.tokenizer) == (tiny.data, tiny.tokenizer)
        assert (config.depth, config.batch, config.engine) == (tiny.depth, tiny.batch, tiny.engine)
        assert config.schedule == tiny.schedule


def validations(run_dir: Path) -> list[dict[str, Any]]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if "validation/rows" in record]


@pytest.mark.parametrize("name", ["failed-run-1", "failed-run-2"])
def test_a_failed_run_trains_and_does_not_repeat_its_alarm(workspace: Path, name: str) -> None:
    run_dir = workspace / "out/runs" / name
    # limits that every state meets, so that the alarm is on from the first validation
    limits = ["validation.alarms.after_steps=0", "validation.alarms.collapse_correlation=1e-3"]
    start = ["train", f"experiment={name}", "debug=tiny", *SMALL, "run.steps=3", *limits]
    for arguments in (start, ["train", f"run.dir={run_dir}", "run.steps=6"]):
        done = run_cli(workspace, *arguments)
        assert done.returncode == 0, done.stderr
    first, second = validations(run_dir)
    assert (first["step"], second["step"]) == (3, 6)
    for record in (first, second):
        assert record["alarm/collapse"] == 1
        assert record["validation/loss_at_1_nats"] == record["validation/loss_nats"][0]
        assert record["validation/loss_at_mean_nats"] == record["validation/loss_nats"][2]
        parts = {key for key in record if key.startswith("optimizer/effective_rate_")}
        assert len(parts) == (4 if name == "failed-run-1" else 5), "the first has no adapter"
        assert all(record[key] > 0 for key in parts)
    log = (run_dir / "logs/rank-00000.log").read_text()
    assert re.findall(r"(\w+) \S+: alarm collapse (\w+)", log) == [("WARNING", "begins")]
