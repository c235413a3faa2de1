"""Small models and the published model's golden numbers."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pretrain.model.config import ComputePath, DocumentMask, ModelConfig
from pretrain.model.huggingface.weights import load_pretrained
from pretrain.model.init import initialize
from pretrain.model.recurrent import RecurrentModel

GOLDEN = Path(__file__).parent.parent / "golden"


class Golden(NamedTuple):
    """A published-format folder, its model, and what the published code computed with it."""

    folder: Path
    model: RecurrentModel
    values: dict[str, Tensor]


FOLDERS, PATHS = ("a_1_2_1_d96", "b_2_4_2_d48"), (ComputePath.reference, ComputePath.fused)


@pytest.fixture(
    params=list(itertools.product(FOLDERS, PATHS)), ids=lambda p: f"{p[0]}-{p[1].value}"
)
def golden(request: pytest.FixtureRequest) -> Golden:
    """On every path that is written by hand: all of them are Huginn."""
    name, path = request.param
    published = load_pretrained(GOLDEN / name)
    model = RecurrentModel(dataclasses.replace(published.config, path=path))
    model.load_state_dict(published.state_dict())
    return Golden(GOLDEN / name, model, load_file(GOLDEN / name / "fixture.safetensors"))


MakeModel = Callable[..., RecurrentModel]


@pytest.fixture
def make_model() -> MakeModel:
    """A small initialised model in float64, where 1e-10 separates a bug from rounding."""

    def make(
        *,
        documents: DocumentMask = DocumentMask.causal,
        dtype: torch.dtype = torch.float64,
        digit_positions: int | None = None,
    ) -> RecurrentModel:
        config = ModelConfig(
            name="small",
            width=16,
            heads=2,
            inner=24,
            prelude_layers=1,
            core_layers=2,
            coda_layers=1,
            vocabulary_size=32,
            context=16,
            documents=documents,
            digit_positions=digit_positions,
        )
        model = RecurrentModel(config).to(dtype)
        initialize(model, mean_depth=4, seed=5)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            # At initialisation the branches are near zero and biases are zero: make them matter.
            for name, parameter in model.named_parameters():
                if name.endswith("qk_bias"):
                    parameter.normal_(0.0, 0.5, generator=generator)
                if name.endswith(("output", "down")):
                    parameter.mul_(6.0)
        if model.digit_embedding is not None:
            model.digit_embedding.tell_digits(range(10))
        return model

    return make
