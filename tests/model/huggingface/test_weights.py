"""Folders of the published format load whole, or are refused with what is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.errors import CheckpointError
from pretrain.model.huggingface.weights import hugging_face_name, load_pretrained

SOURCE = Path(__file__).parents[2] / "golden" / "b_2_4_2_d48"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(SOURCE / name, tmp_path / name)
    return tmp_path


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) drop tensors; `__` in a name stands for a dot."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, path)


def reconfigure(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_every_tensor_lands_in_its_place(folder):
    model = load_pretrained(folder)
    theirs = load_file(folder / "model.safetensors")
    seen = set()
    for name, value in model.named_parameters():
        published = hugging_face_name(name)
        assert torch.equal(value, theirs[published]), published
        seen.add(published)
    assert seen == theirs.keys() - {"freqs_cis"}


def test_shards_load_like_one_file(folder):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for index in range(3):
        part = {name: tensors[name] for name in names[index::3]}
        save_file(part, folder / f"part-{index}.safetensors")
        weight_map |= dict.fromkeys(part, f"part-{index}.safetensors")
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    sharded, whole = load_pretrained(folder), load_pretrained(SOURCE)
    for name, value in whole.named_parameters():
        assert torch.equal(sharded.get_parameter(name), value), name
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"part-1\.safetensors is missing"):
        load_pretrained(folder)


def test_a_duplicate_of_the_tied_head_is_accepted_and_another_head_is_not(folder):
    embedding = load_file(folder / "model.safetensors")["transformer.wte.weight"]
    rewrite(folder, lm_head__weight=embedding.clone())
    assert torch.equal(load_pretrained(folder).embedding.weight, embedding)
    rewrite(folder, lm_head__weight=embedding * 1.01)
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from transformer.wte"):
        load_pretrained(folder)


def test_weights_take_the_wanted_dtype(folder):
    model = load_pretrained(folder, dtype=torch.bfloat16)
    exact = load_file(folder / "model.safetensors")["transformer.adapter.weight"]
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.core.iteration.adapter, exact.bfloat16())


def test_the_rotary_table_may_be_absent_but_not_wrong(folder):
    table = load_file(folder / "model.safetensors")["freqs_cis"]
    rewrite(folder, freqs_cis=None)
    load_pretrained(folder)
    rewrite(folder, freqs_cis=table.bfloat16())
    load_pretrained(folder)
    rewrite(folder, freqs_cis=table.flip(-1).contiguous())
    with pytest.raises(CheckpointError, match="freqs_cis is off by"):
        load_pretrained(folder)
    rewrite(folder, freqs_cis=table[..., 0].contiguous())
    with pytest.raises(CheckpointError, match="freqs_cis has shape"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer__ln_f__weight": None}, "1 of 75 tensors are missing: transformer.ln_f"),
        ({"transformer__extra": torch.zeros(2)}, "transformer.extra has no place"),
        (
            {"transformer__adapter__weight": torch.zeros(48, 48)},
            r"adapter.weight has shape \(48, 48\), the model of config.json needs \(48, 96\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, changes, message):
    rewrite(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"injection_type": "add"}, "injection_type='add', but only 'linear'"),
        ({"tie_embeddings": False}, "tie_embeddings=False"),
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"num_key_value_heads": 2}, "grouped-query"),
        ({"rope_base": 10_000}, "freqs_cis is off by"),
    ],
)
def test_another_architecture_is_refused(folder, changes, message):
    reconfigure(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(folder)


def test_a_key_that_config_lacks_is_named(folder):
    path = folder / "config.json"
    found = json.loads(path.read_text())
    del found["block_size"]
    path.write_text(json.dumps(found))
    with pytest.raises(CheckpointError, match="'block_size' is missing"):
        load_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_and_damaged_files_are_named(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=f"{name}: not"):
        load_pretrained(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load_pretrained(folder)
