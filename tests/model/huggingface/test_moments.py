"""An optimizer's moments travel beside the weights, bit for bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.errors import CheckpointError
from pretrain.model.huggingface import load_pretrained
from pretrain.model.huggingface.moments import read_moments, save_moments

SOURCE = Path(__file__).parents[2] / "golden" / "b_2_4_2_d48"


@pytest.fixture
def moments() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(value.shape, generator=draw), torch.rand(value.shape, generator=draw))
        for name, value in load_pretrained(SOURCE).named_parameters()
    }


def test_moments_and_steps_come_back(tmp_path, moments):
    save_moments(tmp_path, moments, 47_360)
    found, steps = read_moments(tmp_path)
    assert steps == 47_360
    assert found.keys() == moments.keys()
    for name, (first, second) in moments.items():
        assert torch.equal(found[name][0], first), name
        assert torch.equal(found[name][1], second), name


def test_they_carry_the_published_names(tmp_path, moments):
    save_moments(tmp_path, moments, 3)
    weights = load_file(SOURCE / "model.safetensors").keys() - {"freqs_cis"}
    found = load_file(tmp_path / "optimizer.safetensors")
    assert found.keys() == {
        f"{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq") for name in weights
    }
    adapter = found["exp_avg_sq.transformer.adapter.weight"]
    assert torch.equal(adapter, moments["core.iteration.adapter"][1])


def test_a_folder_without_moments_has_none():
    assert read_moments(SOURCE) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exp_avg.transformer.ln_f.weight": None}, r"final_norm\.gain has only exp_avg_sq"),
        ({"momentum.transformer.ln_f.weight": torch.zeros(1)}, "momentum.* is neither of exp_avg"),
        ({"exp_avg.transformer.other": torch.zeros(1)}, r"transformer\.other has no place"),
        ({"exp_avg.transformer.ln_f.weight": torch.full((48,), torch.nan)}, "are not finite"),
    ],
)
def test_moments_that_do_not_fit_are_named(tmp_path, moments, changes, message):
    save_moments(tmp_path, moments, 3)
    path = tmp_path / "optimizer.safetensors"
    tensors = load_file(path) | changes
    kept = {name: value for name, value in tensors.items() if value is not None}
    save_file(kept, path, metadata={"steps": "3"})
    with pytest.raises(CheckpointError, match=message):
        read_moments(tmp_path)


def test_a_damaged_file_is_refused(tmp_path, moments):
    save_moments(tmp_path, moments, 3)
    path = tmp_path / "optimizer.safetensors"
    save_file(load_file(path), path)
    with pytest.raises(CheckpointError, match="steps='', not a whole number"):
        read_moments(tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_moments(tmp_path)
