"""`pretrain doctor`: names what is missing, with its remedy and exit code, and tells no secret."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def doctor(tmp_path, *overrides, **environ):
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pretrain",
            "doctor",
            f"run.dir={tmp_path}/run",
            f"data.shards={tmp_path}/shards",
            f"tokenizer.path={tmp_path}/tokenizer",
            *overrides,
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
        capture_output=True,
        text=True,
    )


def test_machine_without_shards_is_told_to_build_them_and_secrets_stay_secret(tmp_path):
    """Everything else is in order here: one real step is taken, in bf16 and under ZeRO-2."""
    result = doctor(
        tmp_path,
        "engine=zero2-bf16",
        "engine.device=cpu",
        WANDB_API_KEY="a-secret-of-forty",
        WANDB_MODE="online",
    )
    assert result.returncode == 65
    assert "missing shards" in result.stdout
    assert "pretrain data build" in result.stdout
    assert "missing tokenizer" in result.stdout
    assert "2 of" in result.stderr
    assert "keep this machine from training tiny: tokenizer, shards." in result.stderr
    assert "trial step    cpu, bf16, ZeRO-2: loss 6." in result.stdout
    assert "wandb         online (logging.wandb=auto)" in result.stdout
    assert "a-secret" not in result.stdout + result.stderr
    assert not list(tmp_path.iterdir()), "doctor left something behind"


def test_device_that_does_not_exist_is_a_configuration_error(tmp_path):
    result = doctor(tmp_path, "engine.device=cuda", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 64
    assert "engine.device=cuda, but torch" in result.stdout
    assert "engine.device=auto" in result.stdout
