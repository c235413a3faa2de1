"""Models whose sizes are counted: the published one, and a small one in each form of block."""

import dataclasses

import pytest

from pretrain.model.config import Block, Injection, ModelConfig

HUGINN = ModelConfig(
    name="huginn-3.5b",
    width=5280,
    heads=55,
    inner=17920,
    prelude_layers=2,
    core_layers=4,
    coda_layers=2,
    vocabulary_size=65536,
    context=4096,
)
SMALL = ModelConfig(
    name="small",
    width=64,
    heads=4,
    inner=96,
    prelude_layers=1,
    core_layers=2,
    coda_layers=1,
    vocabulary_size=128,
    context=32,
)
FORMS = {
    "published": SMALL,
    "failed run 1": dataclasses.replace(
        SMALL, norm_gain=False, injection=Injection.add, embedding_scale=False, qk_bias=False
    ),
    "failed run 2": dataclasses.replace(SMALL, block=Block.pre_norm),
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
