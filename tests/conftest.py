"""A workspace with text, tokenizer and shards, made once by the commands themselves."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SMALL = [
    "data=files", "data.name=small", "data.root=text",
    "data.rows_per_member=8", "data.members_per_shard=4", "data.build_workers=1",
    "model.width=32", "model.heads=2", "model.inner=48", "model.vocabulary_size=384",
    "model.context=32", "batch.global_tokens=512", "batch.micro_rows=4",
    "depth.mean=4", "depth.backprop=2", "logging=quiet", "optimizer.learning_rate=2e-3",
    "schedule.warmup_tokens=512", "schedule.cooldown_tokens=1024",
    "validation.rows=8", "validation.depths=[1,2,4]", "validation.every_steps=3",
    "checkpoint.every_steps=2", "run.steps=6",
]  # fmt: skip

WORDS = [
    "state", "core", "loop", "depth", "token", "row", "shard", "seed", "rank", "step", "loss",
    "think", "again", "deeper",
]  # fmt: skip


def write_text(root: Path) -> None:
    """Two sources of a few hundred short documents."""
    draw = random.Random(0)
    for source in ("prose", "sums"):
        (root / source).mkdir(parents=True)
        with (root / source / "part.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(300):
                if source == "prose":
                    text = " ".join(draw.choices(WORDS, k=draw.randint(5, 80))) + ".\n"
                else:
                    a, b = draw.randrange(1000), draw.randrange(1000)
                    text = f"{a} + {b} = {a + b}\n" * draw.randint(1, 9)
                file.write(json.dumps({"text": text}) + "\n")


Cli = Callable[..., subprocess.CompletedProcess[str]]


def run_cli(
    cwd: Path, *arguments: str, timeout_s: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command `pretrain` in `cwd` as a person would, and return what it said."""
    return subprocess.run(
        [sys.executable, "-m", "pretrain", *arguments],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text/, and out/ with its tokenizer and shards."""
    folder = tmp_path_factory.mktemp("workspace")
    write_text(folder / "text")
    for command in ("tokenizer", "build"):
        done = run_cli(folder, "data", command, *SMALL)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder
