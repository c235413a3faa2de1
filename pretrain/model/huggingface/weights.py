"""Weights and configuration from a Hugging Face folder of the model type `huginn_raven`."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.errors import CheckpointError
from pretrain.model.config import ModelConfig
from pretrain.model.recurrent import RecurrentModel
from pretrain.model.rotary import angles

# What this code's model is; a folder that says otherwise is another model.
_REQUIRED: dict[str, Any] = {
    "model_type": "huginn_raven",
    "block_class_name": "SandwichBlock",
    "norm_class_name": "RMSNorm_llama",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "injection_type": "linear",
    "qk_bias": True,
    "bias": False,
    "tie_embeddings": True,
}

_EMBEDDING = "transformer.wte.weight"
_HEAD = "lm_head.weight"
_ANGLES = "freqs_cis"

# Ours -> theirs; applied in turn.
_RENAMES = (
    (r"^embedding\.weight$", _EMBEDDING),
    (r"^core\.iteration\.adapter$", "transformer.adapter.weight"),
    (r"^final_norm\.gain$", "transformer.ln_f.weight"),
    (r"^(prelude|coda)\.", r"transformer.\1."),
    (r"^core\.iteration\.layers\.", "transformer.core_block."),
    (r"\.(norm_\d)\.gain$", r".\1.weight"),
    (r"\.attention\.qkv$", ".attn.Wqkv.weight"),
    (r"\.attention\.qk_bias$", ".attn.qk_bias"),
    (r"\.attention\.output$", ".attn.proj.weight"),
    (r"\.mlp\.gate_up$", ".mlp.fc.weight"),
    (r"\.mlp\.down$", ".mlp.proj.weight"),
)


def load_pretrained(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> RecurrentModel:
    """The model of a Hugging Face folder.

    Raises CheckpointError if files are missing or damaged, the folder holds another architecture,
    or a tensor is missing, left over, or of another shape.
    """
    folder = Path(folder)
    with torch.device("meta"):
        model = RecurrentModel(read_config(folder))
    model = model.to(dtype).to_empty(device=device)
    load_weights(model, folder)
    return model


def hugging_face_name(name: str) -> str:
    """The published name of one of our parameters."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def read_config(folder: str | Path) -> ModelConfig:
    """The shape of the model in a Hugging Face folder, from its config.json."""
    path = Path(folder) / "config.json"
    found = _read_json(path)
    for key, wanted in _REQUIRED.items():
        if found.get(key) != wanted:
            raise CheckpointError(
                f"{path}: {key}={found.get(key)!r}, but only {wanted!r} is this model."
            )
    try:
        heads = found["n_heads"]
        if found.get("num_key_value_heads", heads) != heads:
            raise CheckpointError(
                f"{path}: num_key_value_heads={found['num_key_value_heads']} differs from "
                f"n_heads={heads}; grouped-query attention is not this model."
            )
        return ModelConfig(
            name=Path(folder).name,
            width=found["n_embd"],
            heads=heads,
            inner=found["intermediate_size"],
            prelude_layers=found["n_layers_in_prelude"],
            core_layers=found["n_layers_in_recurrent_block"],
            coda_layers=found["n_layers_in_coda"],
            vocabulary_size=found.get("padded_vocab_size", found["vocab_size"]),
            context=found["block_size"],
            rope_base=float(found["rope_base"]),
            norm_epsilon=float(found["norm_eps"]),
        )
    except KeyError as error:
        raise CheckpointError(f"{path}: the key {error} is missing.") from None


@torch.no_grad()
def load_weights(model: RecurrentModel, folder: str | Path) -> None:
    """Fill the model's parameters, in their dtype and on their device, one tensor at a time.

    A duplicate of the tied embedding (`lm_head.weight`) must equal it; a stored rotary table
    (`freqs_cis`) must agree with the model's angles.
    """
    wanted = {hugging_face_name(name): value for name, value in model.named_parameters()}
    head: Tensor | None = None
    unseen = set(wanted)
    for path, name, value in _tensors(Path(folder)):
        if name == _HEAD:
            head = value
        elif name == _ANGLES:
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
    embedding = wanted[_EMBEDDING]
    if head is not None and not torch.equal(head.to(embedding), embedding):
        raise CheckpointError(
            f"{folder}: {_HEAD} differs from {_EMBEDDING}, but this model ties them."
        )


def _tensors(folder: Path) -> Iterator[tuple[Path, str, Tensor]]:
    """File, name and value of every tensor of the folder, whole or sharded."""
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                    yield path, name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from error


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: the key 'weight_map' is missing.")
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        files = [folder / "model.safetensors"]
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; the folder's weights are incomplete.")
    return files


def _copy(value: Tensor, parameter: Tensor, where: str) -> None:
    if value.shape != parameter.shape:
        raise CheckpointError(
            f"{where} has shape {tuple(value.shape)}, the model of config.json needs "
            f"{tuple(parameter.shape)}."
        )
    parameter.copy_(value)


def _check_angles(table: Tensor, config: ModelConfig, path: Path) -> None:
    """The table is [1, positions, 1, K / 2, 2]: cosine and sine."""
    pairs = config.head_width // 2
    if table.dim() != 5 or table.shape[2:] != (1, pairs, 2):
        raise CheckpointError(
            f"{path}: {_ANGLES} has shape {tuple(table.shape)}, not (1, positions, 1, {pairs}, 2)."
        )
    positions_BT = torch.arange(table.shape[1])[None]
    ours = torch.stack(
        angles(positions_BT, head_width=config.head_width, base=config.rope_base), -1
    )
    difference = (table[:, :, 0].float() - ours).abs().max().item()
    # A bf16 table is off by up to 2^-8; another base or order of pairs is off by more than 1.
    if not difference < 1e-2:
        raise CheckpointError(
            f"{path}: {_ANGLES} is off by {difference:.3g} from rope_base={config.rope_base:g}."
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; is this a Hugging Face folder?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds a {type(found).__name__}, not an object.")
    return found
