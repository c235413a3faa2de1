"""Weights of the published format load whole, or are refused with what is wrong."""

import pickle
from pathlib import Path

import pytest
import torch

from pretrain.errors import CheckpointError
from pretrain.model.huggingface import load_pretrained
from pretrain.model.huggingface.names import hugging_face_name, own_name

SOURCE = Path(__file__).parents[2] / "golden" / "b_2_4_2_d48"


def test_every_tensor_lands_in_its_place(published):
    model = load_pretrained(published.path)
    theirs = published.tensors
    seen = set()
    for name, value in model.named_parameters():
        found = hugging_face_name(name)
        assert torch.equal(value, theirs[found]), found
        assert own_name(found) == name
        seen.add(found)
    assert seen == theirs.keys() - {"freqs_cis"}


@pytest.mark.parametrize("name", ["transformer.extra", "transformer.coda.x.attn.qk_bias", "wte"])
def test_a_name_of_another_model_has_no_translation(name):
    with pytest.raises(CheckpointError, match=f"the tensor {name} has no place"):
        own_name(name)


def test_shards_load_like_one_file(published):
    published.cut()
    sharded, whole = load_pretrained(published.path), load_pretrained(SOURCE)
    for name, value in whole.named_parameters():
        assert torch.equal(sharded.get_parameter(name), value), name
    (published.path / "part-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"part-1\.safetensors is missing"):
        load_pretrained(published.path)


def test_an_index_that_disagrees_with_its_files_is_refused(published):
    weight_map = published.cut()
    first, second = "transformer.adapter.weight", "transformer.coda.0.attn.Wqkv.weight"
    wrong = weight_map | {first: weight_map[second]}
    assert weight_map[first] != weight_map[second]
    published.point(wrong)
    with pytest.raises(CheckpointError, match=f"{first} (is missing|does not belong here), says"):
        load_pretrained(published.path)
    published.point(weight_map | {"transformer.more": "part-0.safetensors"})
    with pytest.raises(CheckpointError, match=r"transformer\.more is missing, says"):
        load_pretrained(published.path)


@pytest.mark.parametrize("file", ["../part-1.safetensors", "/part-1.safetensors", "..", 3])
def test_an_index_may_not_point_outside_its_folder(published, file):
    weight_map = published.cut()
    published.point(dict.fromkeys(weight_map, file))
    with pytest.raises(CheckpointError, match=r"is said to be in .*; only files inside the folder"):
        load_pretrained(published.path)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_an_index_without_a_map_is_refused(published, content):
    published.cut()
    published.index.write_text(content)
    with pytest.raises(CheckpointError, match="'weight_map' is missing or empty"):
        load_pretrained(published.path)


class Bomb:
    """Opening its pickle leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "x.ckpt"])
def test_pickled_weights_are_named_and_never_opened(published, name):
    mark = published.path / "exploded"
    published.weights.unlink()
    (published.path / name).write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(CheckpointError, match=rf"{name}: pickled .* safe_serialization=True"):
        load_pretrained(published.path)
    assert not mark.exists()
    # The bomb is live.
    pickle.loads((published.path / name).read_bytes())
    assert mark.exists()


def test_an_index_of_pickles_is_refused(published):
    weight_map = published.cut()
    published.point(dict.fromkeys(weight_map, "pytorch_model-00001-of-00002.bin"))
    with pytest.raises(CheckpointError, match=r"00001-of-00002\.bin: pickled weights are never"):
        load_pretrained(published.path)
    published.index.rename(published.path / "pytorch_model.bin.index.json")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin\.index\.json: pickled"):
        load_pretrained(published.path)


def test_pickles_beside_safetensors_do_not_matter(published):
    (published.path / "training_args.bin").write_bytes(b"whatever")
    load_pretrained(published.path)


def test_a_duplicate_of_the_tied_head_is_accepted_and_another_head_is_not(published):
    embedding = published.tensors["transformer.wte.weight"]
    published.rewrite(lm_head__weight=embedding.clone())
    assert torch.equal(load_pretrained(published.path).embedding.weight, embedding)
    published.rewrite(lm_head__weight=embedding * 1.01)
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from transformer.wte"):
        load_pretrained(published.path)


def test_weights_take_the_wanted_dtype(published):
    model = load_pretrained(published.path, dtype=torch.bfloat16)
    exact = published.tensors["transformer.adapter.weight"]
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.core.iteration.adapter, exact.bfloat16())


def test_the_rotary_table_may_be_absent_but_not_wrong(published):
    table = published.tensors["freqs_cis"]
    published.rewrite(freqs_cis=None)
    load_pretrained(published.path)
    published.rewrite(freqs_cis=table.bfloat16())
    load_pretrained(published.path)
    published.rewrite(freqs_cis=table.flip(-1).contiguous())
    with pytest.raises(CheckpointError, match="freqs_cis is off by"):
        load_pretrained(published.path)
    for part in (table[..., 0].contiguous(), table[:, :-1].contiguous()):
        published.rewrite(freqs_cis=part)
        with pytest.raises(CheckpointError, match="freqs_cis has shape"):
            load_pretrained(published.path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer__ln_f__weight": None}, "1 of 75 tensors are missing: transformer.ln_f"),
        ({"transformer__extra": torch.zeros(2)}, "transformer.extra has no place"),
        (
            {"transformer__adapter__weight": torch.zeros(48, 48)},
            r"adapter.weight has shape \(48, 48\), the model of config.json needs \(48, 96\)",
        ),
        (
            {"transformer__wte__weight": torch.zeros(250, 48)},
            r"wte.weight has shape \(250, 48\), the model of config.json needs \(256, 48\)",
        ),
        (
            {"transformer__ln_f__weight": torch.full((48,), torch.nan)},
            "ln_f.weight holds numbers that are not finite in torch.float32",
        ),
        (
            {"transformer__ln_f__weight": torch.full((48,), torch.inf)},
            "ln_f.weight holds numbers that are not finite",
        ),
        (
            {"transformer__ln_f__weight": torch.ones(48, dtype=torch.int8)},
            "ln_f.weight holds torch.int8; quantized",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(published, changes, message):
    published.rewrite(**changes)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(published.path)


def test_weights_too_large_for_the_wanted_dtype_are_refused(published):
    published.rewrite(transformer__ln_f__weight=torch.full((48,), 1e5))
    load_pretrained(published.path)
    with pytest.raises(CheckpointError, match=r"not finite in torch\.float16"):
        load_pretrained(published.path, dtype=torch.float16)


@pytest.mark.parametrize("kept", [4, 100, 20_000, 750_000])
def test_a_truncated_file_is_refused(published, kept):
    whole = published.weights.read_bytes()
    assert kept < len(whole)
    published.weights.write_bytes(whole[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a whole safetensors file"):
        load_pretrained(published.path)


def test_missing_files_are_named(published):
    published.weights.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        load_pretrained(published.path)
    (published.path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_pretrained(published.path)
