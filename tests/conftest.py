"""A workspace with text, tokenizer and shards, made once by the commands themselves."""

import faulthandler
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key
from hypothesis import HealthCheck, settings

# How long an example or drawing it takes says how busy this machine is: pytest's limit is enough.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item):
    """A limit for what follows a failure, too: a test that fails takes its limits with it."""
    if limit_s := float(item.config.getini("faulthandler_timeout")):
        stderr = item.config.stash[fault_handler_stderr_fd_key]
        faulthandler.dump_traceback_later(limit_s, file=stderr, exit=True)
    return (yield)


SMALL = [
    "data=files", "data.name=small", "data.root=text",
    "data.rows_per_member=8", "data.members_per_shard=4", "data.build_workers=1",
    "model.width=32", "model.heads=2", "model.inner=48", "model.vocabulary_size=384",
    "model.context=32", "batch.global_tokens=512", "batch.micro_rows=4",
    "depth.mean=4", "depth.backprop=2", "logging=quiet", "optimizer.learning_rate=2e-3",
    "schedule.warmup_tokens=512", "schedule.cooldown_tokens=1024",
    "validation.rows=8", "validation.depths=[1,2,4]", "validation.every_steps=3",
    "validation.prompts=[state]", "validation.sample_tokens=4",
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


def run_cli(
    cwd: Path, *arguments: str, timeout_s: float = 300, **environment: str
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


def weights_of(run_dir: Path, step: int) -> list[tuple[str, str]]:
    """Hash of every file of weights and moments, as the manifest has them."""
    manifest = json.loads((run_dir / f"checkpoints/step-{step:010d}/manifest.json").read_text())
    return sorted(
        (name, entry["sha256"])
        for name, entry in manifest["files"].items()
        if name.endswith(".safetensors")
    )


PUBLISHED_SPECIAL = ["begin_text", "end_text", "begin_header", "end_header", "end_turn", "pad"]


def write_published_tokenizer(
    folder: Path,
    vocabulary_size: int,
    *,
    special: dict[str, str] | None = None,
    splits_digits: bool = False,
    frames: bool = False,
) -> None:
    """A byte-level BPE, trained here, as the files that come with published weights.

    `special`: tokens by their role (bos, eos, pad); none: those of the published tokenizer.
    `frames`: whether its post-processor puts the first two around a text.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    names = list((special or {name: f"<|{name}|>" for name in PUBLISHED_SPECIAL}).values())
    roles = special or {"bos": names[0], "eos": names[1], "pad": names[-1]}
    rules = Tokenizer(models.BPE())
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splits_digits)]
    if splits_digits:
        pattern = Regex(r"\n+|\p{N}|[^\S\n]?\p{L}+|[^\p{L}\p{N}\s]| {2,16}|\s")
        steps.insert(0, pre_tokenizers.Split(pattern, "isolated"))
    rules.pre_tokenizer = pre_tokenizers.Sequence(steps)
    rules.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [path.read_text() for path in sorted(Path(__file__).parent.glob("data/test_*.py"))]
    rules.train_from_iterator(texts, trainer)
    assert rules.get_vocab_size() == vocabulary_size
    if frames:
        rules.post_processor = processors.TemplateProcessing(
            single=f"{names[0]} $A {names[1]}", special_tokens=[(names[0], 0), (names[1], 1)]
        )
    folder.mkdir(parents=True, exist_ok=True)
    rules.save(str(folder / "tokenizer.json"))
    config = {f"{role}_token": name for role, name in roles.items()}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def published_tokenizer() -> Callable[..., None]:
    """Writes a tokenizer like the published one into a folder."""
    return write_published_tokenizer


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text/, and out/ with its tokenizer and shards."""
    folder = tmp_path_factory.mktemp("workspace")
    write_text(folder / "text")
    for command in ("tokenizer", "build"):
        done = run_cli(folder, "data", command, *SMALL)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder
