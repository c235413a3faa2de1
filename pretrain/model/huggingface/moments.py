"""An optimizer's moments beside the published weights, so that a run can go on from a folder."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pretrain.errors import CheckpointError
from pretrain.model.huggingface.names import hugging_face_name, own_name
from pretrain.model.huggingface.weights import read_tensors

MOMENTS = "optimizer.safetensors"

_KINDS = ("exp_avg", "exp_avg_sq")


def save_moments(
    folder: str | Path, moments: Mapping[str, tuple[Tensor, Tensor]], steps: int
) -> None:
    """Write (exp_avg, exp_avg_sq) of each of our parameters' names, and the steps they took.

    Float32 as `KIND.PUBLISHED_NAME`. Raises CheckpointError if the file cannot be written.
    """
    tensors = {
        f"{kind}.{hugging_face_name(name)}": value.detach().to("cpu", torch.float32).contiguous()
        for name, pair in moments.items()
        for kind, value in zip(_KINDS, pair, strict=True)
    }
    path = Path(folder) / MOMENTS
    temporary = path.with_name(f"{MOMENTS}.tmp-{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata={"format": "pt", "steps": str(steps)})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} could not be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_moments(folder: str | Path) -> tuple[dict[str, tuple[Tensor, Tensor]], int] | None:
    """Moments by our names and their steps; None if the folder has none.

    Raises CheckpointError if the file is damaged, a moment lacks its other half, or one is not
    finite.
    """
    path = Path(folder) / MOMENTS
    if not path.is_file():
        return None
    found: dict[str, dict[str, Tensor]] = {}
    for _, key, value in read_tensors({path: None}):
        kind, _, published = key.partition(".")
        if kind not in _KINDS:
            raise CheckpointError(f"{path}: {key} is neither of {' and '.join(_KINDS)}.")
        if not bool(value.isfinite().all()):
            raise CheckpointError(f"{path}: {key} holds numbers that are not finite.")
        found.setdefault(own_name(published), {})[kind] = value
    for name, kinds in found.items():
        if len(kinds) != len(_KINDS):
            raise CheckpointError(f"{path}: {name} has only {', '.join(kinds)}.")
    moments = {name: (kinds["exp_avg"], kinds["exp_avg_sq"]) for name, kinds in found.items()}
    return moments, _steps(path)


def _steps(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        steps = (file.metadata() or {}).get("steps", "")
    if not steps.isdecimal():
        raise CheckpointError(f"{path}: its metadata say steps={steps!r}, not a whole number.")
    return int(steps)
