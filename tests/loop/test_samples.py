"""Samples of a validation: the text that generate gives, on any engine, at no cost to training."""

import json
import logging
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import SMALL, run_cli
from pretrain.compose import load
from pretrain.config import TrainConfig
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import ConfigError
from pretrain.loop.origin import read_origin
from pretrain.loop.samples import Sampler, sample_seed
from pretrain.loop.sink import SAMPLES
from pretrain.model.init import initialize
from pretrain.model.recurrent import RecurrentModel
from pretrain.testing import start_commands

PROMPTS = ["12 + 30 =", "state core", ""]
ASKED = [
    f"validation.prompts={json.dumps(PROMPTS)}",
    "validation.sample_depths=[4,1]",
    "validation.sample_tokens=6",
    "validation.sample_temperature=0.7",
]


def train(workspace: Path, name: str, *overrides: str, ranks: int = 1) -> list[dict[str, Any]]:
    """The whole record of a run of three steps, validated after each."""
    words = ["train", *SMALL, "run.steps=3", "validation.every_steps=1", f"run.name={name}"]
    output = workspace / "said" / name
    processes = start_commands(ranks, [*words, *overrides], cwd=workspace, output=output)
    try:
        for process in processes:
            process.join(180)
        said = "\n".join(path.read_text() for path in output.glob("*.txt"))
        assert [process.exitcode for process in processes] == [0] * ranks, said
    finally:
        for process in processes:
            process.kill()
            process.join()
    lines = (workspace / "out/runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def without_seconds(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What of a record no clock and no sample has written."""
    clocks = ("speed/", "time/", "data/wait_s", "progress/", "memory/", "ranks/", "checkpoint/")
    return [
        {key: value for key, value in record.items() if not key.startswith((*clocks, SAMPLES))}
        for record in records
    ]


def samples_of(records: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    return {record["step"]: record[SAMPLES] for record in records if SAMPLES in record}


@pytest.fixture(scope="module")
def sampled(workspace: Path) -> list[dict[str, Any]]:
    """The record of a run with samples."""
    return train(workspace, "sampled", *ASKED)


def test_the_run_knows_what_it_ran_on(workspace: Path, spread: list[dict[str, Any]]) -> None:
    found = read_origin(workspace / "out/runs/spread")
    assert found["software"]["torch"] == torch.__version__
    assert found["software"]["python"] == platform.python_version()
    assert {"deepspeed", "triton", "numpy", "webdataset", "cuda", "driver"} < set(found["software"])
    assert list(found["devices"].values()) == [2]
    assert next(iter(found["devices"])).startswith("CPU: ")


def test_every_prompt_is_continued_at_every_depth_after_each_validation(
    workspace: Path, sampled: list[dict[str, Any]]
) -> None:
    found = samples_of(sampled)
    assert list(found) == [1, 2, 3]
    for step, samples in found.items():
        wanted = [(prompt, depth) for prompt in PROMPTS for depth in (1, 4)]
        assert [(sample["prompt"], sample["depth"]) for sample in samples] == wanted
        assert {sample["seed"] for sample in samples} == {sample_seed(0, step)}
    assert len({sample_seed(run, step) for run in (0, 1) for step in (1, 2, 3)}) == 6
    for record in sampled:
        if SAMPLES in record:
            assert record["time/samples_s"] > 0 < record["time/validation_s"]
    said = (workspace / "said/sampled/0.txt").read_text()
    shown = " ".join((PROMPTS[0] + found[3][1]["text"]).split())
    assert f"sample at step 3, r=4: {shown}" in said


def test_generate_repeats_a_sample_from_its_seed(
    workspace: Path, sampled: list[dict[str, Any]]
) -> None:
    for sample in samples_of(sampled)[3][1:2]:
        done = run_cli(
            workspace, "generate", "run.dir=out/runs/sampled", "generate.max_new_tokens=6",
            f"generate.prompt='{sample['prompt']}'", f"generate.num_steps={sample['depth']}",
            f"generate.seed={sample['seed']}", "generate.temperature=0.7", "generate.top_p=1",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{sample['prompt']}{sample['text']}\n"


@pytest.fixture(scope="module")
def spread(workspace: Path) -> list[dict[str, Any]]:
    """The same with a part of the weights on each of two ranks."""
    return train(workspace, "spread", "engine.zero_stage=3", *ASKED, ranks=2)


def test_training_is_the_same_bits_with_samples_and_without(
    workspace: Path, sampled: list[dict[str, Any]], spread: list[dict[str, Any]]
) -> None:
    drawn = train(
        workspace, "drawn", "engine.zero_stage=2", *ASKED, "validation.sample_temperature=1",
        ranks=2,
    )  # fmt: skip
    for stage, ranks, with_samples in ((1, 1, sampled), (2, 2, drawn), (3, 2, spread)):
        on = f"engine.zero_stage={stage}"
        plain = train(workspace, f"plain-{stage}", on, "validation.prompts=[]", ranks=ranks)
        assert samples_of(plain) == {}
        assert list(samples_of(with_samples)) == [1, 2, 3]
        assert without_seconds(with_samples) == without_seconds(plain)


def test_weights_in_parts_write_what_whole_ones_write(
    sampled: list[dict[str, Any]], spread: list[dict[str, Any]]
) -> None:
    first, alone = samples_of(spread)[1], samples_of(sampled)[1]
    # the weights are one step of sums in another order apart: about 1e-6 in logits
    assert [each["text"] for each in first] == [each["text"] for each in alone]


def config_with(*overrides: str, **validation: object) -> TrainConfig:
    words = [f"validation.{key}={json.dumps(value)}" for key, value in validation.items()]
    words = [*SMALL, "validation.sample_depths=[2]", *words, *overrides]
    config: TrainConfig = load("train", words)
    return config


def take(config: TrainConfig, workspace: Path, seen: list[int] | None = None) -> list[str]:
    model = RecurrentModel(config.model)
    initialize(model, mean_depth=4, seed=0)

    def forward(tokens: torch.Tensor, *rest: Any, **named: Any) -> Any:
        if seen is not None:
            seen.append(len(tokens))
        return model(tokens, *rest, **named)

    sampler = Sampler(config, Tokenizer.load(workspace / config.tokenizer.path))
    found = sampler.take(forward, step=7, device=torch.device("cpu"))
    return [each["text"] for each in found.get(SAMPLES, [])]


def test_many_prompts_pass_in_parts_no_larger_than_a_micro_batch(workspace: Path) -> None:
    seen: list[int] = []
    prompts = [f"{number} + {number} =" for number in range(11)]
    whole = take(config_with(prompts=prompts, sample_tokens=3), workspace, seen)
    # rows of 16 tokens, as many as 4 rows of 32
    assert seen == [8] * 3 + [3] * 3
    alone = take(config_with(prompts=prompts[9:10], sample_tokens=3), workspace)
    assert whole[9:10] == alone


def test_a_token_that_no_tokenizer_knows_does_not_stop_a_run(workspace: Path) -> None:
    config = config_with(
        "tokenizer.vocabulary_size=384", "tokenizer.path=out/tokenizer/small-384",
        "model.vocabulary_size=8192", prompts=["12"], sample_temperature=1.0,
    )  # fmt: skip
    # of 8 tokens drawn by an untrained model, 19 in 20 are beyond the tokenizer's 384
    (text,) = take(config, workspace)
    assert len(text) <= 32


def test_a_prompt_that_fills_the_context_is_refused_and_a_long_one_shortens_samples(
    workspace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=r"validation\.prompts\[1\] has \d+ tokens.*context=32"):
        take(config_with(prompts=["a", "deeper " * 40]), workspace)
    with caplog.at_level(logging.WARNING):
        take(config_with(prompts=["12 + 30 ="], sample_tokens=40), workspace)
    assert "not validation.sample_tokens=40" in caplog.text


def test_no_prompt_is_no_sample_and_no_depth_is_refused(workspace: Path) -> None:
    assert take(config_with(prompts=[], sample_depths=[]), workspace) == []
    for bad in ({"sample_depths": []}, {"sample_depths": [0]}, {"sample_temperature": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            config_with(prompts=["a"], **bad)
