"""What is saved is the published format to the letter, and is whole or is not there."""

import json
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pretrain.errors import CheckpointError, ConfigError
from pretrain.model.config import ModelConfig
from pretrain.model.huggingface import load_pretrained, save_pretrained
from pretrain.model.init import initialize
from pretrain.model.recurrent import RecurrentModel

GOLDEN = Path(__file__).parents[2] / "golden"
# The fixtures' class files carry other names than ours.
OURS = {"auto_map"}


def layout(path: Path) -> dict[str, tuple[list[int], str]]:
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}


@pytest.fixture
def model() -> RecurrentModel:
    return load_pretrained(GOLDEN / "b_2_4_2_d48")


@pytest.mark.parametrize("name", ["a_1_2_1_d96", "b_2_4_2_d48"])
def test_a_published_folder_comes_back_the_same(tmp_path, name):
    target = tmp_path / "made" / name
    save_pretrained(load_pretrained(GOLDEN / name), target)
    assert layout(target / "model.safetensors") == layout(GOLDEN / name / "model.safetensors")
    ours, theirs = (
        load_file(target / "model.safetensors"),
        load_file(GOLDEN / name / "model.safetensors"),
    )
    for key, value in theirs.items():
        if key == "freqs_cis":
            # Two ways to compute theta round a float32 differently, at positions up to 127.
            torch.testing.assert_close(ours[key], value, atol=127 * 2**-23, rtol=0.0)
        else:
            assert torch.equal(ours[key], value), key
    config, wanted = (
        json.loads((folder / "config.json").read_text()) for folder in (target, GOLDEN / name)
    )
    assert config.keys() == wanted.keys()
    for key in config.keys() - OURS:
        assert config[key] == wanted[key], key
        assert type(config[key]) is type(wanted[key]), key


def test_the_folder_holds_all_that_transformers_needs(tmp_path, model):
    class Tokenizer:
        def export(self, folder: Path) -> dict[str, object]:
            (folder / "tokenizer.json").write_text("{}")
            return {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 3}

    save_pretrained(model, tmp_path / "out", tokenizer=Tokenizer(), card="# A model\n")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "modeling_huginn.py",
        "tokenizer.json", "README.md",
    }  # fmt: skip
    for name in ("config.json", "generation_config.json"):
        found = json.loads((tmp_path / "out" / name).read_text())
        assert (found["bos_token_id"], found["eos_token_id"], found["pad_token_id"]) == (
            1,
            [2, 5],
            3,
        )
    assert (tmp_path / "out" / "README.md").read_text() == "# A model\n"
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1
    module = json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]["AutoConfig"]
    assert (tmp_path / "out" / f"{module.split('.')[0]}.py").is_file()
    # Special ids are bookkeeping: the folder reads back.
    load_pretrained(tmp_path / "out")


def test_shards_stay_below_their_size_and_read_back(tmp_path, model):
    save_pretrained(model, tmp_path / "out", shard_bytes=100_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == 9
    assert files[0].name == "model-00001-of-00009.safetensors"
    sizes = [sum(value.nbytes for value in load_file(path).values()) for path in files]
    # The first also has the rotary table, 64 x 6 x 2 float32.
    assert max(sizes[1:]) <= 100_000
    assert sizes[0] <= 100_000 + 64 * 6 * 2 * 4
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert (
        index["weight_map"].keys() == load_file(GOLDEN / "b_2_4_2_d48" / "model.safetensors").keys()
    )
    again = load_pretrained(tmp_path / "out")
    for name, value in model.named_parameters():
        assert torch.equal(again.get_parameter(name), value), name


def test_weights_take_the_wanted_dtype_and_angles_stay_float32(tmp_path, model):
    save_pretrained(model, tmp_path / "out", dtype=torch.bfloat16)
    found = layout(tmp_path / "out" / "model.safetensors")
    assert found.pop("freqs_cis")[1] == "F32"
    assert {dtype for _, dtype in found.values()} == {"BF16"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again = load_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    for name, value in model.named_parameters():
        assert torch.equal(again.get_parameter(name), value.bfloat16()), name


def test_a_model_of_unknown_depth_is_said_to_be_used_as_published(tmp_path, caplog):
    config = ModelConfig(
        name="new", width=16, heads=2, inner=8, prelude_layers=1, core_layers=1, coda_layers=1,
        vocabulary_size=8, context=8,
    )  # fmt: skip
    model = RecurrentModel(config)
    initialize(model, mean_depth=4, seed=1)
    save_pretrained(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["mean_recurrence"], config["mean_backprop_depth"]) == (32, 8)
    assert "usual depth is unknown" in caplog.text


def test_a_folder_that_holds_something_is_left_alone(tmp_path, model):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="already holds something"):
        save_pretrained(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ConfigError, match="already holds something"):
        save_pretrained(model, tmp_path / "notes.txt")
    (tmp_path / "empty").mkdir()
    save_pretrained(model, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


def test_a_weight_that_is_not_finite_leaves_no_folder(tmp_path, model):
    with torch.no_grad():
        model.final_norm.gain[3] = torch.nan
    with pytest.raises(CheckpointError, match=r"transformer\.ln_f\.weight is not finite"):
        save_pretrained(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_said_with_its_numbers(tmp_path, model, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"needs 0\.07 GB, 0\.01 GB are free"):
        save_pretrained(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_no_folder(tmp_path, model):
    class FullDisk:
        def export(self, folder: Path) -> dict[str, object]:
            # The kernel's own device without room.
            with open("/dev/full", "w") as file:
                file.write("x" * 100_000)
            return {}

    with pytest.raises(CheckpointError, match=r"could not be written: .*No space left"):
        save_pretrained(model, tmp_path / "out", tokenizer=FullDisk())
    assert list(tmp_path.iterdir()) == []


def test_a_variant_is_refused_before_anything_is_written(tmp_path, model):
    model.config.qk_bias = False
    with pytest.raises(ConfigError, match=r"model\.qk_bias=False has no place"):
        save_pretrained(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
