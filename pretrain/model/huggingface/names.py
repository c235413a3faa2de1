"""Names of tensors, ours and the published ones: the same tensors, one to one."""

import re

from pretrain.errors import CheckpointError

EMBEDDING = "transformer.wte.weight"
HEAD = "lm_head.weight"
ANGLES = "freqs_cis"

_WHOLE = {
    "embedding.weight": EMBEDDING,
    "core.iteration.adapter": "transformer.adapter.weight",
    "final_norm.gain": "transformer.ln_f.weight",
}
_PARTS = {
    "prelude": "transformer.prelude",
    "core.iteration.layers": "transformer.core_block",
    "coda": "transformer.coda",
}
_LEAVES = {
    "attention.qkv": "attn.Wqkv.weight",
    "attention.qk_bias": "attn.qk_bias",
    "attention.output": "attn.proj.weight",
    "mlp.gate_up": "mlp.fc.weight",
    "mlp.down": "mlp.proj.weight",
} | {f"norm_{index}.gain": f"norm_{index}.weight" for index in (1, 2, 3, 4)}


def hugging_face_name(name: str) -> str:
    """The published name of one of our parameters. Raises CheckpointError if it has none."""
    return _translate(name, _WHOLE, _PARTS, _LEAVES)


def own_name(name: str) -> str:
    """Our name of a published tensor. Raises CheckpointError if it is none of the model's."""
    return _translate(name, _turned(_WHOLE), _turned(_PARTS), _turned(_LEAVES))


def _translate(
    name: str, whole: dict[str, str], parts: dict[str, str], leaves: dict[str, str]
) -> str:
    if name in whole:
        return whole[name]
    layer = re.fullmatch(r"(.+?)\.(\d+)\.(.+)", name)
    if layer is None or layer[1] not in parts or layer[3] not in leaves:
        raise CheckpointError(f"the tensor {name} has no place in the published model.")
    return f"{parts[layer[1]]}.{layer[2]}.{leaves[layer[3]]}"


def _turned(names: dict[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in names.items()}
