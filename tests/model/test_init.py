"""The takase initialisation, tensor by tensor, and the size of the presets."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from pretrain.model.config import ModelConfig
from pretrain.model.init import initial_values, initialize
from pretrain.model.recurrent import RecurrentModel
from pretrain.optim.groups import parameter_groups

PRESETS = Path(__file__).parents[2] / "conf" / "model"

WIDTH = 160


def make(width: int = WIDTH, **changes: int) -> RecurrentModel:
    shape = {"prelude_layers": 2, "core_layers": 4, "coda_layers": 2, **changes}
    return RecurrentModel(
        ModelConfig(
            name="init",
            width=width,
            heads=5,
            inner=320,
            vocabulary_size=512,
            context=32,
            **shape,
        )
    )


@pytest.fixture(scope="module")
def model() -> RecurrentModel:
    model = make()
    initialize(model, mean_depth=32, seed=1)
    return model


def sigma_of(name: str) -> float:
    base = math.sqrt(2 / (5 * WIDTH))
    # 2 + 4 * 32 + 2 effective layers
    return base / math.sqrt(2 * 132) if name.endswith(("output", "down")) else base


def test_matrices_have_their_sigma_and_are_cut_at_three(model):
    checked = 0
    for name, value in model.named_parameters():
        if name.endswith(("gain", "qk_bias")):
            continue
        checked += 1
        scaled = value.detach().double() / sigma_of(name)
        # The std of a normal cut at 3 sigma is 0.98658; 4 standard errors for 34 tensors.
        assert abs(scaled.std() / 0.986578 - 1) < 4 / math.sqrt(2 * value.numel()), name
        assert abs(scaled.mean()) < 4 / math.sqrt(value.numel()), name
        # At least 25,600 numbers: one beyond 2.9 is missing with probability exp(-26).
        assert 2.9 < scaled.abs().max() <= 3.0001, name
    assert checked == 8 * 4 + 2


@pytest.mark.parametrize("rows", ["queries", "keys", "values", "gate", "up"])
def test_both_halves_of_the_mlp_and_all_of_qkv_share_one_sigma(model, rows):
    block = model.core.iteration.layers[1]
    query, key, value = block.attention.qkv.detach().chunk(3)
    gate, up = block.mlp.gate_up.detach().chunk(2)
    part = {"queries": query, "keys": key, "values": value, "gate": gate, "up": up}[rows]
    expected = 0.986578 * math.sqrt(2 / (5 * WIDTH))
    assert abs(part.std().item() / expected - 1) < 4 / math.sqrt(2 * part.numel())


def test_gains_are_one_and_biases_zero(model):
    for name, value in model.named_parameters():
        if name.endswith("gain"):
            assert (value == 1).all(), name
        if name.endswith("qk_bias"):
            assert (value == 0).all(), name


def test_published_numbers_come_out():
    """From the published code: sigma 0.00870388, projections 0.000535687 at mean depth 32."""
    base = math.sqrt(2 / (5 * 5280))
    assert base == pytest.approx(0.00870388, rel=1e-6)
    narrow = make()
    wide_out = base / math.sqrt(2 * 132)
    assert wide_out == pytest.approx(0.000535687, rel=1e-5)
    initialize(narrow, mean_depth=1, seed=1)
    expected = 0.986578 * math.sqrt(2 / (5 * WIDTH)) / math.sqrt(2 * 8)
    found = narrow.coda[0].mlp.down.std().item()
    assert found == pytest.approx(expected, rel=0.015)


def test_a_tensor_depends_on_its_name_and_the_seed_alone(model):
    fewer = make(core_layers=1)
    initialize(fewer, mean_depth=7, seed=1)
    name = "core.iteration.layers.0.attention.qkv"
    assert torch.equal(fewer.get_parameter(name), model.get_parameter(name))
    initialize(fewer, mean_depth=7, seed=2)
    assert not torch.equal(fewer.get_parameter(name), model.get_parameter(name))
    core = model.core.iteration.layers
    assert not torch.equal(core[0].attention.qkv, core[1].attention.qkv)


def test_bf16_weights_are_float32_weights_rounded(model):
    rounded = make().bfloat16()
    initialize(rounded, mean_depth=32, seed=1)
    for name, value in rounded.named_parameters():
        assert torch.equal(value, model.get_parameter(name).bfloat16()), name


def count(preset: str, group: Callable[[RecurrentModel], object] = lambda model: model) -> int:
    values = yaml.safe_load((PRESETS / f"{preset}.yaml").read_text())
    with torch.device("meta"):
        part = group(RecurrentModel(ModelConfig(**values)))
    assert isinstance(part, torch.nn.Module)
    return sum(parameter.numel() for parameter in part.parameters())


def test_the_published_model_has_its_parameters():
    assert count("huginn-3.5b") == 3_564_976_800
    assert count("huginn-3.5b", lambda model: model.prelude) == 790_796_160
    assert count("huginn-3.5b", lambda model: model.core.iteration.layers) == 1_581_592_320
    assert count("huginn-3.5b", lambda model: model.coda) == 790_796_160
    assert count("huginn-3.5b", lambda model: model.embedding) == 346_030_080
    adapter = count("huginn-3.5b", lambda model: model.core) - 1_581_592_320
    assert adapter == 55_756_800


@pytest.fixture(scope="module")
def published() -> RecurrentModel:
    values = yaml.safe_load((PRESETS / "huginn-3.5b.yaml").read_text())
    with torch.device("meta"):
        return RecurrentModel(ModelConfig(**values))


def test_every_tensor_of_the_published_model_begins_as_published(published):
    """As worked out from the published code, at a slice from the end of each tensor."""
    sigmas = {"weight": 0.00870388, "qkv": 0.00870388, "gate_up": 0.00870388, "adapter": 0.00870388}
    sigmas |= {"output": 0.000535687, "down": 0.000535687}
    slice_elements = 40_000
    checked = 0
    for name, parameter in published.named_parameters():
        elements = range(
            parameter.numel() - min(slice_elements, parameter.numel()), parameter.numel()
        )
        values = initial_values(published, name, elements, mean_depth=32, seed=0).double()
        kind = name.rsplit(".", 1)[-1]
        if kind in ("gain", "qk_bias"):
            assert (values == (1.0 if kind == "gain" else 0.0)).all(), name
            continue
        checked += 1
        scaled = values / sigmas[kind]
        # 4 standard errors, and the table's six digits
        assert abs(scaled.std() / 0.98658 - 1) < 4 / math.sqrt(2 * slice_elements) + 1e-5, name
        assert abs(scaled.mean()) < 4 / math.sqrt(slice_elements), name
        # One of 40,000 beyond 2.9 is missing with probability exp(-40).
        assert 2.9 < scaled.abs().max() <= 3.0001, name
    assert checked == 8 * 4 + 2


def test_a_slice_is_what_the_whole_tensor_holds_there(model):
    name = "core.iteration.layers.2.mlp.down"
    part = initial_values(model, name, range(1000, 1100), mean_depth=32, seed=1)
    assert torch.equal(part, model.get_parameter(name).detach().view(-1)[1000:1100])


def test_undecayed_parameters_of_the_published_model_are_counted(published):
    decayed, undecayed = parameter_groups(published.named_parameters(), weight_decay=1.0)
    assert sum(p.numel() for p in undecayed["params"]) == 258_720
    assert sum(p.numel() for p in decayed["params"]) == 3_564_976_800 - 258_720


def test_the_middle_preset_is_what_its_name_says():
    assert count("huginn-100m") == pytest.approx(112e6, rel=0.01)
