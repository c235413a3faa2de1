"""The middle way: the plain layers by torch.compile."""

import dataclasses
import logging

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from pretrain.errors import ConfigError
from pretrain.model import block
from pretrain.model.config import ComputePath, DocumentMask, ModelConfig
from pretrain.model.depth import Depth
from pretrain.model.init import initialize
from pretrain.model.recurrent import RecurrentModel
from pretrain.testing import tiny_config, tiny_engine, tiny_model

SMALL = ModelConfig(
    name="small", width=32, heads=2, inner=48, prelude_layers=1, core_layers=1, coda_layers=1,
    vocabulary_size=61, context=16,
)  # fmt: skip
# Compiled code sums in another order and keeps float32 in registers between steps: some hundred
# summands of relative error 6e-8 through six layers.
TOLERANCE = 1e-5


def gradients(path, rows, documents=DocumentMask.causal):
    config = dataclasses.replace(SMALL, path=path, documents=documents)
    model = RecurrentModel(config)
    initialize(model, mean_depth=3, seed=1)
    generator = torch.Generator().manual_seed(rows)
    tokens = torch.randint(61, (rows, 17), generator=generator)
    state = torch.randn(rows, 16, 32, generator=generator)
    depths = [Depth(row, 2) for row in range(rows)]
    output = model(
        tokens[:, :-1], depths, initial_state=state, labels=tokens[:, 1:],
        documents=torch.arange(16).div(5, rounding_mode="floor").expand(rows, 16),
    )  # fmt: skip
    output.loss.backward()
    return {"loss": output.loss.detach()} | {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("documents", DocumentMask, ids=lambda mask: mask.value)
def test_a_layer_is_one_graph(monkeypatch, documents):
    """Compiled without a prefix and with one, which runs without gradient: two graphs in all."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    layer = torch.compile(block._sandwich, backend=counter)
    monkeypatch.setattr(block, "_compiled_sandwich", lambda: layer)
    wanted = gradients(ComputePath.reference, 2, documents)
    found = gradients(ComputePath.compiled, 2, documents)
    torch._dynamo.reset()
    for name, exact in wanted.items():
        assert (found[name] - exact).norm() <= TOLERANCE * exact.norm(), name
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_layers_give_the_plain_losses_and_gradients(caplog):
    with caplog.at_level(logging.WARNING):
        for rows in (1, 3):
            wanted = gradients(ComputePath.reference, rows)
            found = gradients(ComputePath.compiled, rows)
            for name, exact in wanted.items():
                distance = (found[name] - exact).norm() / exact.norm()
                assert distance < TOLERANCE, f"{rows} rows, {name}: {distance}"
    # past its limit of recompilations torch would run the layers uncompiled
    assert not any("recompile" in record.getMessage() for record in caplog.records)


def test_compiled_layers_under_gathered_weights_are_refused():
    model = tiny_model(path=ComputePath.compiled)
    with pytest.raises(ConfigError, match=r"model\.path=compiled with engine\.zero_stage=3"):
        tiny_config(model=model, engine=tiny_engine(zero_stage=3))
    for stage in (1, 2):
        tiny_config(model=model, engine=tiny_engine(zero_stage=stage))
