"""Writing the published format: a folder that transformers reads, with all that it needs."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pretrain.errors import CheckpointError, ConfigError
from pretrain.model.huggingface.config import PUBLISHED_DEPTH, write_config
from pretrain.model.huggingface.names import ANGLES, hugging_face_name
from pretrain.model.huggingface.weights import INDEX, WEIGHTS, angle_table
from pretrain.model.recurrent import RecurrentModel

MODELING = "modeling_huginn.py"

log = logging.getLogger(__name__)

# Configuration, modeling file and tokenizer beside the weights; a 65,536 piece tokenizer has 10 MB.
_SPARE_BYTES = 64 << 20


class ExportableTokenizer(Protocol):
    """What an export asks of a tokenizer."""

    def export(self, folder: Path) -> dict[str, Any]:
        """Write the files that AutoTokenizer reads; the special ids for config.json."""


def save_pretrained(
    model: RecurrentModel,
    folder: str | Path,
    *,
    tokenizer: ExportableTokenizer | None = None,
    dtype: torch.dtype = torch.float32,
    shard_bytes: float = 5e9,
    card: str | None = None,
) -> None:
    """Write the model, its modeling file and tokenizer into a new folder, whole or not at all.

    Weights take `dtype`; files of them stay below `shard_bytes`; `card` becomes README.md. The
    usual depth is the model's, or else the published one, 32 with gradient through 8.

    Raises ConfigError if the folder holds something or the model is a variant that the format has
    no words for, CheckpointError if a weight is not finite or the files cannot be written.
    """
    depth = model.usual_depth or PUBLISHED_DEPTH
    if model.usual_depth is None:
        log.warning("the model's usual depth is unknown; config.json says the published %s", depth)
    config = write_config(model.config, depth, str(dtype).removeprefix("torch."))
    tensors = {hugging_face_name(name): value for name, value in model.named_parameters()}
    sizes = {name: value.numel() * dtype.itemsize for name, value in tensors.items()}

    def write(temporary: Path) -> None:
        special = {} if tokenizer is None else tokenizer.export(temporary)
        _write_json(temporary / "config.json", config | special)
        generation = special | {"transformers_version": config["transformers_version"]}
        _write_json(temporary / "generation_config.json", generation)
        source = resources.files("pretrain.model.huggingface").joinpath(MODELING)
        (temporary / MODELING).write_bytes(source.read_bytes())
        if card is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8")
        shards = list(_split(sizes, shard_bytes))
        for index, names in enumerate(shards):
            part = {name: _ready(name, tensors[name], dtype) for name in names}
            if index == 0:
                part[ANGLES] = angle_table(model.config)
                names.append(ANGLES)
            path = temporary / _file_name(index, len(shards))
            save_file(part, path, metadata={"format": "pt"})
            # safetensors makes files private; these are as public as the others.
            path.chmod((temporary / "config.json").stat().st_mode)
        if len(shards) > 1:
            _write_json(temporary / INDEX, _index(shards, sum(sizes.values())))

    _publish(Path(folder), sum(sizes.values()), write)


def _ready(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    ready = value.detach().to("cpu", dtype).contiguous()
    if not bool(ready.isfinite().all()):
        raise CheckpointError(
            f"{name} is not finite in {dtype}: the model was not initialised, has diverged, or "
            "needs a wider dtype."
        )
    return ready


def _split(sizes: Mapping[str, int], shard_bytes: float) -> Iterator[list[str]]:
    """Names in order, cut before a shard would exceed its size; a larger tensor is alone."""
    names: list[str] = []
    filled = 0
    for name in sorted(sizes):
        if names and filled + sizes[name] > shard_bytes:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += sizes[name]
    yield names


def _file_name(index: int, shards: int) -> str:
    return WEIGHTS if shards == 1 else f"model-{index + 1:05d}-of-{shards:05d}.safetensors"


def _index(shards: list[list[str]], total: int) -> dict[str, Any]:
    weight_map = {
        name: _file_name(index, len(shards)) for index, names in enumerate(shards) for name in names
    }
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _publish(folder: Path, size: int, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder, then give it its name."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} already holds something; name a new or an empty folder.")
    folder = folder.absolute()
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < size + _SPARE_BYTES:
            raise CheckpointError(
                f"{folder} needs {(size + _SPARE_BYTES) / 1e9:.2f} GB, {free / 1e9:.2f} GB are "
                "free; clear some or choose another disk."
            )
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write(temporary)
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
