"""How far a unit of momentum moves a weight, on whole tensors and on ZeRO's partitions."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.engine.deepspeed import Engine
from pretrain.engine.world import World
from pretrain.model.depth import Depth
from pretrain.model.init import initialize
from pretrain.model.recurrent import RecurrentModel
from pretrain.optim import effective_rate
from pretrain.optim.config import AdamWConfig
from pretrain.optim.effective_rate import PARTS, effective_rates, part_of
from pretrain.optim.ellis_adam import EllisAdam
from pretrain.optim.slices import Fragment, Layout, Partition, TensorInfo
from pretrain.testing import load_module, run_ranks, tiny_config, tiny_engine

RATE, STEPS, ROWS = 0.01, 3, 4
NAMES = [f"optimizer/effective_rate_{part}" for part in PARTS]


def train(world: World, stage: int, optimizer: str) -> tuple[dict[str, float], dict[str, float]]:
    """Three steps, then the rates, and a naive oracle from the gathered second moments."""
    changes: dict[str, Any] = {"engine": tiny_engine(zero_stage=stage)}
    if optimizer == "adamw":
        changes["optimizer"] = AdamWConfig(
            name="adamw", learning_rate=RATE, weight_decay=0.1, epsilon=1e-3
        )
    config = tiny_config(**changes)
    model = RecurrentModel(config.model)
    initialize(model, mean_depth=4, seed=0)
    engine = Engine(model, config, world, micro_steps=1)
    assert effective_rates(engine.optimizer, engine.layout) == {}
    share = slice(world.rank * ROWS // world.size, (world.rank + 1) * ROWS // world.size)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(323, (ROWS, 9), generator=generator)[share]
        state = torch.randn(ROWS, 8, 24, generator=generator)[share]
        output = engine(
            tokens[:, :-1], [Depth(1, 2)] * len(tokens), initial_state=state, labels=tokens[:, 1:]
        )
        # some clips are above 1: the third gradient is four times the others'
        engine.backward(output.nats, scale=(4.0 if step == 2 else 1.0) / (ROWS * 8))
        engine.step(RATE * (step + 1))
    return effective_rates(engine.optimizer, engine.layout), oracle(world, engine, optimizer)


def oracle(world: World, engine: Engine, optimizer: str) -> dict[str, float]:
    """Element by element, from every rank's pieces."""
    pieces: list[tuple[str, float]] = []
    for partition in engine.layout.partitions:
        square = engine.moments(partition.flat)["exp_avg_sq"]
        for fragment in partition.fragments:
            clip = 1.0
            if optimizer == "ellis-adam":
                clip = float(engine.optimizer.clips[partition.flat][fragment.tensor])
            for v in partition.piece(fragment, square).double().tolist():
                root = (v / (1 - 0.95**STEPS)) ** 0.5 + (1e-3 if optimizer == "adamw" else 0.0)
                name = partition.tensors[fragment.tensor].name
                pieces.append((part_of(name), RATE * STEPS / clip / root))
    everyone = [piece for rank in world.gather_objects(pieces) for piece in rank]
    found = {}
    for part, name in zip(PARTS, NAMES, strict=True):
        values = [value for other, value in everyone if other == part]
        found[name] = sum(values) / len(values)
    return found


@pytest.mark.parametrize(
    ("ranks", "stage", "optimizer"),
    [(1, 1, "ellis-adam"), (2, 1, "ellis-adam"), (2, 3, "ellis-adam"), (2, 3, "adamw")],
)
def test_every_stage_gives_the_mean_over_all_weights(
    ranks: int, stage: int, optimizer: str
) -> None:
    for found, expected in run_ranks(load_module(Path(__file__)).train, ranks, stage, optimizer):
        assert list(found) == NAMES
        # float32 square roots and reciprocals, summed in float64
        assert found == pytest.approx(expected, rel=1e-6)
        assert len(set(found.values())) == len(PARTS)


def test_clipping_lowers_the_rate_of_the_tensor_it_clips(monkeypatch) -> None:
    monkeypatch.setattr(effective_rate, "CHUNK_ELEMENTS", 3)
    weight = torch.ones(10, requires_grad=True)
    optimizer = EllisAdam([weight], lr=0.1, weight_decay=0.0)
    infos = (TensorInfo("embedding.weight", (4,)), TensorInfo("coda.0.mlp.down", (2, 3)))
    fragments = (Fragment(0, 0, 0, 4), Fragment(1, 0, 4, 6))
    layout = Layout([Partition(weight, infos, fragments)], lambda _: None)
    optimizer.layout = layout
    for size in (1.0, 9.0):
        weight.grad = torch.ones(10)
        weight.grad[4:] = size
        optimizer.step()
    # v: 1 and 1; then 1 for the first tensor and 0.95 + 0.05 * 81 = 5 for the second, which is
    # clipped by sqrt(81 / 5)
    correction = (1 - 0.95**2) ** 0.5
    found = effective_rates(optimizer, layout)
    assert found["optimizer/effective_rate_embedding"] == pytest.approx(0.1 * correction, rel=1e-6)
    assert found["optimizer/effective_rate_coda"] == pytest.approx(
        0.1 * correction / 5**0.5 / (81 / 5) ** 0.5, rel=1e-6
    )
    assert len(found) == 2


def test_every_parameter_of_the_model_has_a_part() -> None:
    with torch.device("meta"):
        model = RecurrentModel(tiny_config().model)
    parts = {name: part_of(name) for name, _ in model.named_parameters()}
    assert parts["embedding.weight"] == "embedding"
    assert parts["prelude.0.norm_1.gain"] == "prelude"
    assert parts["core.iteration.adapter"] == "adapter"
    assert parts["core.iteration.layers.1.mlp.down"] == "core"
    assert parts["coda.0.attention.qkv"] == parts["final_norm.gain"] == "coda"
    assert set(parts.values()) == set(PARTS)
