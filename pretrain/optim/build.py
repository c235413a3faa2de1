"""From configuration to optimizer."""

from collections.abc import Iterable

from torch import nn

from pretrain.errors import ConfigError
from pretrain.optim.adamw import AdamW
from pretrain.optim.config import AdamWConfig, EllisAdamConfig, OptimizerConfig
from pretrain.optim.ellis_adam import EllisAdam
from pretrain.optim.groups import parameter_groups


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig
) -> EllisAdam | AdamW:
    """The configured optimizer over `model.named_parameters()`.

    Its rate is the peak rate until the engine sets another.
    """
    groups = parameter_groups(parameters, weight_decay=config.weight_decay)
    if isinstance(config, EllisAdamConfig):
        return EllisAdam(
            groups,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            beta1=config.beta1,
            beta2=config.beta2,
            floor=config.floor,
            update_clipping=config.update_clipping,
            running_init=config.running_init,
        )
    if isinstance(config, AdamWConfig):
        return AdamW(
            groups,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            beta1=config.beta1,
            beta2=config.beta2,
            epsilon=config.epsilon,
        )
    raise ConfigError(
        f"optimizer={type(config).__name__} ({config.name}) is unknown; choose "
        "optimizer=ellis-adam or optimizer=adamw."
    )
