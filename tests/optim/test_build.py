import pytest
import torch
from torch import nn

from pretrain.errors import ConfigError
from pretrain.optim.adamw import AdamW
from pretrain.optim.build import build_optimizer
from pretrain.optim.config import AdamWConfig, EllisAdamConfig, OptimizerConfig
from pretrain.optim.ellis_adam import EllisAdam


def updated(config: OptimizerConfig) -> torch.Tensor:
    """A matrix after three updates with fixed gradients."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 4))
    optimizer = build_optimizer([("weight", weight)], config)
    for _ in range(3):
        weight.grad = torch.randn(4, 4)
        optimizer.step()
    return weight.data


def ellis(**changes: float | bool) -> EllisAdamConfig:
    values = {"learning_rate": 0.01, "weight_decay": 0.1} | changes
    return EllisAdamConfig(name="ellis-adam", **values)  # type: ignore[arg-type]


def adamw(**changes: float) -> AdamWConfig:
    return AdamWConfig(name="adamw", **({"learning_rate": 0.01, "weight_decay": 0.1} | changes))


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0.02},
        {"weight_decay": 0.2},
        {"beta1": 0.8},
        {"beta2": 0.9},
        {"floor": 10.0},
        {"update_clipping": False},
        {"running_init": False},
    ],
)
def test_every_field_of_ellis_adam_has_an_effect(change: dict[str, float | bool]) -> None:
    assert not torch.equal(updated(ellis(**change)), updated(ellis()))


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0.02},
        {"weight_decay": 0.2},
        {"beta1": 0.8},
        {"beta2": 0.9},
        {"epsilon": 0.1},
    ],
)
def test_every_field_of_adamw_has_an_effect(change: dict[str, float]) -> None:
    assert not torch.equal(updated(adamw(**change)), updated(adamw()))


def test_the_configured_class_is_built() -> None:
    weight = [("weight", nn.Parameter(torch.zeros(2, 2)))]
    assert isinstance(build_optimizer(weight, ellis()), EllisAdam)
    assert isinstance(build_optimizer(weight, adamw()), AdamW)


def test_an_unknown_optimizer_is_refused() -> None:
    config = OptimizerConfig(name="lion", learning_rate=1.0, weight_decay=0.0)
    with pytest.raises(ConfigError, match=r"lion.*ellis-adam"):
        build_optimizer([("weight", nn.Parameter(torch.zeros(2, 2)))], config)
