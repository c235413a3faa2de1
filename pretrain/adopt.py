"""The command `pretrain adopt`: a run that starts from published weights and their tokenizer.

It leaves a run folder as a run has it after zero steps: `pretrain train run.dir=...` resumes it.
"""

import dataclasses
import logging
import os
import re
import shutil
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from pretrain.compose import FREE_FOR_A_RUN, parse_overrides, write_frozen
from pretrain.config import AdoptConfig, TrainConfig
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import CheckpointError, ConfigError, DataError
from pretrain.model.huggingface.config import read_config

log = logging.getLogger(__name__)

# What a folder says nothing of, or only proposes: rows may be shorter or longer than its context.
_FREE = ("name", "documents", "context")
_DEFAULT_ROWS = 8


def complete(overrides: Sequence[str]) -> list[str]:
    """The overrides after those that follow from the folder that hf= names.

    Raises ConfigError if hf= is missing or no folder, or an override contradicts it.
    """
    given: dict[str, Any] = {
        parsed.key_or_group: parsed.value() for parsed in parse_overrides(overrides)
    }
    folder = Path(str(given.get("hf", "")))
    if not given.get("hf") or not folder.is_dir():
        raise ConfigError(
            f"hf={given.get('hf', '')} is no folder: `pretrain adopt hf=FOLDER run.dir=...` needs "
            "one with config.json, model.safetensors and tokenizer.json."
        )
    shape, depth = read_config(folder)
    known: dict[str, Any] = {
        f"model.{field.name}": getattr(shape, field.name)
        for field in dataclasses.fields(shape)
        # how it is computed is ours to choose
        if f"model.{field.name}" not in FREE_FOR_A_RUN
    }
    tokenizer_path = given.get("tokenizer.path")
    known["tokenizer.vocabulary_size"] = _vocabulary_size(
        folder, Path(tokenizer_path) if tokenizer_path else None, shape.vocabulary_size
    )
    _check_contradictions(given, known, folder)
    # part of paths
    known["model.name"] = re.sub(r"[^\w.-]+", "-", shape.name)
    if "run.dir" in given and not given.keys() & {"run.name", "experiment"}:
        # otherwise the preset's, which is that of another model
        known["run.name"] = re.sub(r"[^\w.-]+", "-", Path(str(given["run.dir"])).resolve().name)
    known |= {"depth.mean": depth.total, "depth.backprop": depth.with_grad}
    if not any(key in ("experiment", "batch", "debug") or "batch." in key for key in given):
        context = given.get("model.context", shape.context)
        known |= {"batch.global_tokens": _DEFAULT_ROWS * context, "batch.micro_rows": 1}
    return [f"{key}={_spell(value)}" for key, value in known.items()] + list(overrides)


def main(config: AdoptConfig) -> None:
    """Write the run folder, whole or not at all."""
    run_dir = Path(config.run.dir)
    shape, _ = read_config(config.hf)
    if shape.context != config.model.context:
        log.warning(
            "rows will have %d tokens, the weights know %d; an export will say the former",
            config.model.context,
            shape.context,
        )
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise ConfigError(
            f"run.dir={run_dir} already holds something; adopt into a new folder, or go on with "
            f"`pretrain train run.dir={run_dir}`."
        )
    partial = run_dir.with_name(f".{run_dir.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        _write(config, partial)
        os.replace(partial, run_dir)
    except OSError as error:
        raise CheckpointError(f"{run_dir} cannot be written: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(
        f"adopted {config.hf} as {run_dir}\n"
        f"next: pretrain data build run.dir={run_dir}\n"
        f"      pretrain train run.dir={run_dir} run.steps=..."
    )


def _write(config: AdoptConfig, target: Path) -> None:
    # `pretrain adopt --help` and a wrong override need no torch
    from pretrain.data.tokenizer_adopted import adopt_tokenizer
    from pretrain.engine.saving import write_first_checkpoint
    from pretrain.loop.state import TrainState
    from pretrain.model.huggingface.moments import read_moments
    from pretrain.model.huggingface.weights import load_pretrained

    source, own_path = Path(config.hf), Path(config.run.dir) / "tokenizer"
    if Path(config.tokenizer.path) == own_path:
        tokenizer = adopt_tokenizer(
            source, target / "tokenizer", vocabulary_size=config.model.vocabulary_size
        )
    else:
        tokenizer = Tokenizer.load(config.tokenizer.path)
    weights = {name: value.detach() for name, value in load_pretrained(source).named_parameters()}
    found = read_moments(source)
    moments = {} if found is None else {
        section: {name: pair[i] for name, pair in found[0].items()}
        for i, section in enumerate(("exp_avg", "exp_avg_sq"))
    }  # fmt: skip
    fields = (field.name for field in dataclasses.fields(TrainConfig))
    write_frozen(TrainConfig(**{name: getattr(config, name) for name in fields}), target)
    write_first_checkpoint(
        target,
        weights,
        moments,
        optimizer_steps=0 if found is None else found[1],
        state={
            "train": TrainState().as_dict(),
            "tokenizer_sha256": tokenizer.sha256,
            "adopted_from": source.resolve().name,
        },
    )


def _vocabulary_size(folder: Path, tokenizer_path: Path | None, embeddings: int) -> int:
    """Of the tokenizer at hand: the folder's own, unless another one is named."""
    if tokenizer_path is None:
        from pretrain.data.tokenizer_adopted import read_tokenizer_files

        _, info = read_tokenizer_files(folder, vocabulary_size=embeddings)
        return int(info["vocabulary_size"])
    size = Tokenizer.load(tokenizer_path).vocabulary_size
    if size > embeddings:
        raise DataError(
            f"Wrong vocabulary: tokenizer.path={tokenizer_path} has ids up to {size - 1}, the "
            f"model of {folder} has {embeddings} embeddings."
        )
    return size


def _check_contradictions(given: dict[str, Any], known: dict[str, Any], folder: Path) -> None:
    for key, value in given.items():
        wanted = known.get(key, value)
        wanted = wanted.name if isinstance(wanted, Enum) else wanted
        if value != wanted and key.removeprefix("model.") not in _FREE:
            raise ConfigError(
                f"{key}={value} contradicts {folder}, whose weights and tokenizer have "
                f"{key}={wanted}. Drop the override."
            )
    if "model" in given:
        raise ConfigError(
            f"model={given['model']} contradicts hf={folder}, which has its own shape of model. "
            "Drop one of the two."
        )


def _spell(value: Any) -> str:
    if isinstance(value, Enum):
        return value.name
    if value is None:
        return "null"
    return f"'{value}'" if isinstance(value, str) else str(value).lower()
