"""Optimizer and schedule. Torch-free."""

import math
from dataclasses import dataclass
from enum import Enum

from pretrain.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """What all optimizers share; choose one with optimizer=ellis-adam or optimizer=adamw."""

    name: str
    """ellis-adam or adamw."""
    learning_rate: float
    """Peak learning rate."""
    weight_decay: float
    """ellis-adam: decay per step at the peak rate; adamw: multiplied by the rate, as usual."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.95
    """Decay of the mean of squared gradients."""
    gradient_clip: float = 1.0
    """Largest global L2 norm of the gradient; 0: no clipping."""

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"optimizer.learning_rate={self.learning_rate} must be above 0.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)} must be in [0, 1).")
        for name in ("weight_decay", "gradient_clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)} must be 0 or more.")


@dataclass(kw_only=True, slots=True)
class EllisAdamConfig(OptimizerConfig):
    """Adam with arctangent updates, clipped per tensor (arXiv 2502.05171, appendix)."""

    update_clipping: bool = True
    """Divide a tensor's rate by the RMS of g / sqrt(v) where that is above 1."""
    running_init: bool = True
    """Start the moments at the first gradient instead of zero."""
    floor: float = 1e-6
    """Smallest sqrt(v)."""

    def __post_init__(self) -> None:
        # by name: a dataclass with slots is another class than the one that super() remembers
        OptimizerConfig.__post_init__(self)
        if not 0 < self.floor < math.inf:
            raise ConfigError(f"optimizer.floor={self.floor} must be above 0.")


@dataclass(kw_only=True, slots=True)
class AdamWConfig(OptimizerConfig):
    """AdamW as in arXiv 1711.05101."""

    epsilon: float = 1e-8
    """Added to sqrt(v)."""

    def __post_init__(self) -> None:
        OptimizerConfig.__post_init__(self)
        if not 0 < self.epsilon < math.inf:
            raise ConfigError(f"optimizer.epsilon={self.epsilon} must be above 0.")


class CooldownShape(Enum):
    """How the rate falls to zero, x being the part of the cool-down that is over."""

    linear = "linear"
    one_minus_sqrt = "one_minus_sqrt"


@dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """Trapezoid: linear warm-up, constant, cool-down, all counted in tokens."""

    warmup_tokens: int
    """Tokens until the peak rate."""
    cooldown_tokens: int
    """Tokens before the end of the run over which the rate falls; 0: none."""
    cooldown_shape: CooldownShape = CooldownShape.linear
    """linear: 1 - x, as published; one_minus_sqrt: 1 - sqrt(x) (arXiv 2405.18392)."""
    min_learning_rate: float = 0.0
    """The cool-down does not go below this."""

    def __post_init__(self) -> None:
        if self.warmup_tokens < 0 or self.cooldown_tokens < 0:
            raise ConfigError(
                f"schedule.warmup_tokens={self.warmup_tokens} and "
                f"schedule.cooldown_tokens={self.cooldown_tokens} must be 0 or more."
            )
        if self.cooldown_tokens == 0 and self.cooldown_shape is not CooldownShape.linear:
            raise ConfigError(
                f"schedule.cooldown_shape={self.cooldown_shape.value} would do nothing with "
                "schedule.cooldown_tokens=0. Give the tokens over which the rate falls."
            )
        if not 0 <= self.min_learning_rate < math.inf:
            raise ConfigError(
                f"schedule.min_learning_rate={self.min_learning_rate} must be 0 or more."
            )
