"""config.json is read strictly: a key that nothing obeys is an error, and so is one that lies."""

import json

import pytest

from pretrain.errors import CheckpointError, ConfigError
from pretrain.model.config import Block, Injection, ModelConfig
from pretrain.model.depth import Depth
from pretrain.model.huggingface.config import read_config, write_config

REQUIRED = (
    "model_type", "block_class_name", "norm_class_name", "mlp_class_name", "nonlin_name",
    "injection_type", "qk_bias", "bias", "tie_embeddings", "n_embd", "n_heads",
    "intermediate_size", "n_layers_in_prelude", "n_layers_in_recurrent_block", "n_layers_in_coda",
    "vocab_size", "padded_vocab_size", "block_size", "mean_recurrence", "mean_backprop_depth",
    "rope_base", "norm_eps",
)  # fmt: skip


def shape(**changes: object) -> ModelConfig:
    values = {
        "name": "some", "width": 5280, "heads": 55, "inner": 17920, "prelude_layers": 2,
        "core_layers": 4, "coda_layers": 2, "vocabulary_size": 65536, "context": 4096,
    }  # fmt: skip
    return ModelConfig(**(values | changes))


def test_the_shape_and_the_usual_depth_are_read(published):
    published.reconfigure(rope_base=1234.5, norm_eps=1e-3, mean_recurrence=7)
    config, depth = read_config(published.path)
    assert (config.width, config.heads, config.inner, config.context) == (48, 4, 80, 64)
    assert (config.prelude_layers, config.core_layers, config.coda_layers) == (2, 4, 2)
    assert (config.vocabulary_size, config.rope_base, config.norm_epsilon) == (256, 1234.5, 1e-3)
    assert depth == Depth(no_grad=4, with_grad=3)


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(published, key):
    published.reconfigure(drop=key)
    with pytest.raises(CheckpointError, match=f"config.json: the key '{key}' is missing"):
        read_config(published.path)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("rope_bse", r"'rope_bse' \(did you mean 'rope_base'\?\) is unknown"),
        ("sliding_window", "'sliding_window' .*is unknown"),
        ("zzz", "'zzz' is unknown"),
    ],
)
def test_an_unknown_key_is_named_with_its_neighbour(published, key, message):
    published.reconfigure(**{key: 8})
    with pytest.raises(CheckpointError, match=message):
        read_config(published.path)


def test_bookkeeping_of_transformers_is_no_surprise(published):
    published.reconfigure(
        use_cache=True, dtype="bfloat16", bos_token_id=1, eos_token_id=[2, 3], pad_token_id=4,
        max_length=20, id2label={"0": "a"}, pruned_heads={}, is_encoder_decoder=False,
        rope_scaling=None, tie_word_embeddings=True, _name_or_path="elsewhere",
    )  # fmt: skip
    assert read_config(published.path)[0].width == 48


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"injection_type": "add"}, "injection_type='add', but only 'linear'"),
        ({"tie_embeddings": False}, "tie_embeddings=False"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"model_type": "llama", "rope_theta": 1e4}, "model_type='llama'"),
        ({"qk_bias": 1}, "qk_bias=1, but only True"),
        ({"test_time_noise": 0.5}, "test_time_noise=0.5, but only 0"),
        ({"state_init": "zero"}, "state_init='zero'"),
        ({"num_key_value_heads": 2}, "grouped-query"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling=.* knows nothing of it"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"n_layers": 9}, "n_layers=9, but the other keys make it 8"),
        ({"head_dim": 16}, "head_dim=16, but the other keys make it 12"),
        ({"init_values": {"embed_scale": 1.0}}, "init_values.embed_scale=1.0"),
        ({"init_values": "none"}, "init_values.embed_scale='none'"),
    ],
)
def test_another_architecture_is_refused(published, changes, message):
    published.reconfigure(**changes)
    with pytest.raises(CheckpointError, match=message):
        read_config(published.path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": "48"}, "n_embd='48' must be a whole number of at least 1"),
        ({"n_embd": 48.0}, r"n_embd=48\.0 must be a whole number"),
        ({"n_heads": True}, "n_heads=True must be a whole number"),
        ({"n_heads": None}, "n_heads=None must be a whole number"),
        ({"block_size": 0}, "block_size=0 must be a whole number of at least 1"),
        ({"mean_recurrence": -3}, "mean_recurrence=-3 must be"),
        ({"rope_base": "50000"}, "rope_base='50000' must be a number above 0"),
        ({"norm_eps": -1e-6}, "norm_eps=-1e-06 must be a number above 0"),
        ({"norm_eps": float("nan")}, "norm_eps=nan must be a number"),
        ({"rope_base": float("inf")}, "rope_base=inf must be a number"),
        ({"vocab_size": 257}, "padded_vocab_size=256 is smaller than vocab_size=257"),
        ({"n_heads": 7}, "must give an even whole head width"),
    ],
)
def test_wrong_types_and_numbers_are_refused(published, changes, message):
    published.reconfigure(**changes)
    with pytest.raises(CheckpointError, match=f"config.json: .*{message}"):
        read_config(published.path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_file_that_is_no_object_is_refused(published, text):
    (published.path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: (not readable|holds a list)"):
        read_config(published.path)


def test_the_real_model_is_written_as_it_was_published():
    written = write_config(shape(), Depth(24, 8), "bfloat16")
    published = {
        "n_embd": 5280, "n_heads": 55, "head_dim": 96, "n_layers": 8, "block_size": 4096,
        "intermediate_size": 17920, "vocab_size": 65536, "padded_vocab_size": 65536,
        "padding_multiple": 4096, "mean_recurrence": 32, "mean_backprop_depth": 8,
        "effective_expected_depth": 132, "rope_base": 50000, "norm_eps": 1e-6,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    assert {key: written[key] for key in published} == published
    values = written["init_values"]
    # arXiv 2502.05171 and its training code: sqrt(2 / 5d), over sqrt(2 x 132) at ends of branches.
    assert values["std"] == pytest.approx(0.00870388, rel=1e-6)
    assert values["out_proj"] == pytest.approx(0.000535687, rel=1e-6)
    assert values["embed_scale"] == pytest.approx(72.6636, rel=1e-6)


@pytest.mark.parametrize("depth", [Depth(24, 8), Depth(0, 1), Depth(-4, 8)])
def test_what_is_written_is_read_again(tmp_path, depth):
    config = shape(name=tmp_path.name, rope_base=10_000.5, vocabulary_size=300)
    written = write_config(config, depth, "float32")
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert read_config(tmp_path) == (config, depth)


@pytest.mark.parametrize(
    "changes",
    [
        {"block": Block.pre_norm},
        {"norm_gain": False},
        {"injection": Injection.add},
        {"embedding_scale": False},
        {"qk_bias": False},
        {"digit_positions": 5},
    ],
)
def test_a_variant_has_no_place_in_the_published_format(changes):
    (name,) = changes
    with pytest.raises(ConfigError, match=f"model.{name}=.* has no place in the published format"):
        write_config(shape(**changes), Depth(24, 8), "float32")
