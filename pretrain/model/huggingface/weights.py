"""Weights from a Hugging Face folder of type `huginn_raven`: safetensors, never pickles."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.errors import CheckpointError
from pretrain.model.config import ModelConfig
from pretrain.model.huggingface.config import read_config, read_json
from pretrain.model.huggingface.names import ANGLES, EMBEDDING, HEAD, hugging_face_name
from pretrain.model.recurrent import RecurrentModel
from pretrain.model.rotary import angles

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_PICKLES = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


def load_pretrained(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> RecurrentModel:
    """The model of a Hugging Face folder; its `usual_depth` is config.json's.

    Raises CheckpointError if files are missing, damaged or pickles, the folder holds another
    architecture, or a tensor is missing, left over, of another shape, or not finite.
    """
    folder = Path(folder)
    config, usual_depth = read_config(folder)
    with torch.device("meta"):
        model = RecurrentModel(config)
    model = model.to(dtype).to_empty(device=device)
    load_weights(model, folder)
    model.usual_depth = usual_depth
    return model


@torch.no_grad()
def load_weights(model: RecurrentModel, folder: str | Path) -> None:
    """Fill the model's parameters, in their dtype and on their device, one tensor at a time.

    A duplicate of the tied embedding (`lm_head.weight`) must equal it; a stored rotary table
    (`freqs_cis`) must agree with the model's angles.
    """
    wanted = {hugging_face_name(name): value for name, value in model.named_parameters()}
    head: Tensor | None = None
    unseen = set(wanted)
    for path, name, value in read_tensors(_weight_files(Path(folder))):
        if name == HEAD:
            head = value
        elif name == ANGLES:
            _check_angles(value, model.config, path)
        elif name not in unseen:
            raise CheckpointError(f"{path}: the tensor {name} has no place in the model.")
        else:
            _copy(value, wanted[name], f"{path}: {name}")
            unseen.remove(name)
    if unseen:
        raise CheckpointError(
            f"{folder}: {len(unseen)} of {len(wanted)} tensors are missing: "
            f"{', '.join(sorted(unseen)[:4])}{', ...' if len(unseen) > 4 else ''}."
        )
    embedding = wanted[EMBEDDING]
    if head is not None and not torch.equal(head.to(embedding), embedding):
        raise CheckpointError(
            f"{folder}: {HEAD} differs from {EMBEDDING}, but this model ties them."
        )


def read_tensors(files: dict[Path, set[str] | None]) -> Iterator[tuple[Path, str, Tensor]]:
    """File, name and value of every tensor; each file must hold the names said, if any are."""
    for path, promised in files.items():
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                if promised is not None and names != promised:
                    raise CheckpointError(
                        f"{path}: {_differences(names, promised)}, says {INDEX}; the folder was "
                        "not written in one go, copy it again."
                    )
                for name in sorted(names):
                    yield path, name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from error


def _differences(names: set[str], promised: set[str]) -> str:
    found = [f"{name} is missing" for name in sorted(promised - names)]
    found += [f"{name} does not belong here" for name in sorted(names - promised)]
    return ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The files of weights and, where an index promises them, the names in each.

    A whole file comes before an index, as transformers reads a folder that has both.
    """
    files: dict[Path, set[str] | None] = {folder / WEIGHTS: None}
    if not (folder / WEIGHTS).is_file():
        if (folder / INDEX).is_file():
            files = _indexed(folder)
        else:
            _refuse_pickles(folder)
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; the folder's weights are incomplete.")
    return files


def _indexed(folder: Path) -> dict[Path, set[str] | None]:
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: the key 'weight_map' is missing or empty.")
    files: dict[Path, set[str] | None] = {}
    for name, file in sorted(weight_map.items()):
        if not isinstance(file, str) or file == ".." or Path(file).name != file:
            raise CheckpointError(
                f"{index}: {name} is said to be in {file!r}; only files inside the folder count."
            )
        if not file.endswith(".safetensors"):
            raise CheckpointError(_no_pickle(folder / file))
        promised = files.setdefault(folder / file, set())
        assert promised is not None
        promised.add(name)
    return files


def _refuse_pickles(folder: Path) -> None:
    for pattern in _PICKLES:
        for path in sorted(folder.glob(pattern)):
            raise CheckpointError(_no_pickle(path))


def _no_pickle(path: Path) -> str:
    return (
        f"{path}: pickled weights are never opened, because opening one runs the code inside it. "
        f"Where you trust it, convert it: in transformers, from_pretrained(...) and then "
        f"save_pretrained(..., safe_serialization=True) write {WEIGHTS}."
    )


def _copy(value: Tensor, parameter: Tensor, where: str) -> None:
    if value.shape != parameter.shape:
        raise CheckpointError(
            f"{where} has shape {tuple(value.shape)}, the model of config.json needs "
            f"{tuple(parameter.shape)}."
        )
    if not value.is_floating_point():
        raise CheckpointError(f"{where} holds {value.dtype}; quantized weights are not read.")
    parameter.copy_(value)
    if not bool(parameter.isfinite().all()):
        raise CheckpointError(
            f"{where} holds numbers that are not finite in {parameter.dtype}; the file is damaged "
            "or the run that wrote it had diverged."
        )


def _check_angles(table: Tensor, config: ModelConfig, path: Path) -> None:
    """The table is [1, context, 1, K / 2, 2]: cosine and sine."""
    wanted = angle_table(config)
    if table.shape != wanted.shape:
        raise CheckpointError(
            f"{path}: {ANGLES} has shape {tuple(table.shape)}, not {tuple(wanted.shape)}."
        )
    difference = (table.float() - wanted).abs().max().item()
    # A bf16 table is off by up to 2^-8; another base or order of pairs is off by more than 1.
    if not difference < 1e-2:
        raise CheckpointError(
            f"{path}: {ANGLES} is off by {difference:.3g} from rope_base={config.rope_base:g}."
        )


def angle_table(config: ModelConfig) -> Tensor:
    """The published rotary table: cosine and sine, float32 [1, context, 1, K / 2, 2]."""
    positions_BT = torch.arange(config.context)[None]
    pair = angles(positions_BT, head_width=config.head_width, base=config.rope_base)
    return torch.stack(pair, -1)[:, :, None]
