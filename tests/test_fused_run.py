"""A run on the fused path is the same run: trained, resumed, evaluated and read as any other."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import SMALL, run_cli
from pretrain import evaluate
from pretrain.compose import load
from pretrain.engine.world import World
from pretrain.errors import ConfigError
from pretrain.loop.trained import load_trained
from pretrain.model.block import SandwichBlock
from pretrain.tasks.config import EvaluateOptions
from pretrain.testing import load_module

# In fp32 one gradient differs by some hundred roundings of 6e-8 of its largest element (1e-5:
# tests/distributed/matrix.py); ELLISAdam's slope carries that into weights that move by 2e-3 a step
# and losses of 6 nats, six times.
TOLERANCE = 1e-5
FP32 = ["engine.precision=fp32"]
PATHS = load_module(Path(__file__).parent / "model" / "fused" / "both_paths.py")


def read(run_dir: Path, key: str) -> dict[int, Any]:
    """A metric by step; of a step that was taken twice, the last."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record[key] for record in map(json.loads, lines) if key in record}


def train(workspace: Path, name: str, *overrides: str) -> Path:
    done = run_cli(workspace, "train", *SMALL, *FP32, f"run.name={name}", *overrides)
    assert done.returncode == 0, done.stderr
    return workspace / "out/runs" / name


@pytest.fixture(scope="module")
def plain(workspace: Path) -> Path:
    """Six steps of the plain modules."""
    return train(workspace, "plain")


@pytest.fixture(scope="module")
def fused(workspace: Path) -> Path:
    """The same on the fused path."""
    return train(workspace, "fused", "model.path=fused")


def assert_same_run(one: Path, other: Path) -> None:
    for key in ("loss/nats", "gradient/norm", "validation/loss_nats"):
        wanted, found = read(one, key), read(other, key)
        assert wanted.keys() == found.keys()
        assert len(wanted) >= 2
        for step, value in wanted.items():
            assert found[step] == pytest.approx(value, rel=TOLERANCE), f"{key} of step {step}"


def test_the_fused_path_trains_the_same_model(plain: Path, fused: Path) -> None:
    assert_same_run(plain, fused)
    assert read(fused, "loss/nats")[6] < read(fused, "loss/nats")[1] - 0.2
    log = (fused / "logs/rank-00000.log").read_text()
    assert log.count("norm_chain on cpu runs as PyTorch") == 1
    assert "causal attention on cpu runs by the CPU's flash kernel" in log
    assert "norm_chain" not in (plain / "logs/rank-00000.log").read_text()


def test_the_path_may_change_when_a_run_resumes(workspace: Path, plain: Path) -> None:
    changed = plain.with_name("changed")
    shutil.copytree(plain, changed)
    # as if it had been stopped after step 4
    shutil.rmtree(changed / "checkpoints/step-0000000006")
    (changed / "checkpoints/latest").write_text("step-0000000004\n")
    train(workspace, "changed", "model.path=fused")
    assert_same_run(plain, changed)
    log = (changed / "logs/rank-00000.log").read_text()
    assert "resuming with model.path=fused (was reference)" in log
    assert "norm_chain on cpu runs as PyTorch" in log


def test_the_model_itself_may_not_change_when_a_run_resumes(workspace: Path, fused: Path) -> None:
    refused = run_cli(workspace, "train", f"run.dir={fused}", "model.norm_epsilon=1e-5")
    assert refused.returncode != 0
    assert "model.norm_epsilon: 1e-06 in the run folder, 1e-05 asked for" in refused.stderr


def test_a_fused_run_is_evaluated_and_read(workspace: Path, plain: Path, fused: Path) -> None:
    prompt = ["generate.prompt='12 + 30 ='", "generate.max_new_tokens=8", "generate.num_steps=4",
              "generate.temperature=0"]  # fmt: skip
    texts, losses = [], []
    for run_dir in (plain, fused):
        done = run_cli(
            workspace,
            "evaluate",
            f"run.dir={run_dir}",
            "evaluate.depths=[1,2,4]",
            "evaluate.rows=8",
        )
        assert done.returncode == 0, done.stderr
        result = json.loads((run_dir / "evaluation/step-0000000006.json").read_text())
        losses.append(result["validation/loss_nats"])
        done = run_cli(workspace, "generate", f"run.dir={run_dir}", *prompt)
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    assert losses[1] == pytest.approx(losses[0], rel=TOLERANCE)
    assert losses[1] == pytest.approx(read(fused, "validation/loss_nats")[6], rel=TOLERANCE)
    assert texts[0] == texts[1]
    assert len(texts[0]) > len("12 + 30 =\n")


def test_float8_trains_in_bf16_and_is_refused_in_fp32(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    float8 = ["model.path=fused", "model.no_grad_precision=fp8", "model.grad_precision=fp8"]
    with pytest.raises(ConfigError, match=r"no_grad_precision=fp8 needs engine\.precision=bf16"):
        load("train", [*SMALL, *float8, *FP32])
    short = ["run.steps=3", "engine.precision=bf16", "run.name=float8"]
    done = run_cli(workspace, "train", *SMALL, *float8, *short)
    assert done.returncode == 0, done.stderr
    run_dir = workspace / "out/runs/float8"
    losses = read(run_dir, "loss/nats")
    assert losses[3] < losses[1]
    # 4 iterations in float8; far from 5.9 nats if they went wrong
    assert abs(read(run_dir, "validation/loss_nats")[3][-1] - losses[3]) < 0.1 * losses[3]
    log = (run_dir / "logs/rank-00000.log").read_text()
    assert log.count("float8 products on cpu are computed in float32") == 1
    monkeypatch.chdir(workspace)
    cpu = torch.device("cpu")
    trained = load_trained(run_dir, cpu)
    options = EvaluateOptions(depths=[1, 4], rows=8)
    (run_dir / "evaluation").mkdir()
    with PATHS.counted_copies() as counted:
        evaluate._measure_held_out(run_dir, trained, World(0, 1, 0, cpu), options)
    layers = sum(isinstance(module, SandwichBlock) for module in trained.model.modules())
    # once for both batches of four rows
    assert counted == {"quantize_rows": 4 * layers}
    evaluated = json.loads((run_dir / "evaluation/step-0000000003.json").read_text())
    assert evaluated["validation/loss_nats"][1] == read(run_dir, "validation/loss_nats")[3][-1]
