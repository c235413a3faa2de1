"""The learning rate of a step, as a pure function of the tokens consumed before it."""

import math

from pretrain.optim.config import CooldownShape, ScheduleConfig


def learning_rate(
    tokens: int, *, step_tokens: int, total_tokens: int, peak: float, config: ScheduleConfig
) -> float:
    """Rate of the step that begins after `tokens` tokens of a run of `total_tokens`.

    Trapezoid. The rise counts the tokens after the step (as the reference, which counts steps
    from 1), the fall those left before it, so no step has rate zero unless the run is over. Where
    rise and fall overlap, the lower one counts. Only the fall is held at `min_learning_rate`.
    """
    rise = min(1.0, (tokens + step_tokens) / max(config.warmup_tokens, 1))
    left = max(total_tokens - tokens, 0)
    fall = min(1.0, left / config.cooldown_tokens) if config.cooldown_tokens else 1.0
    if config.cooldown_shape is CooldownShape.one_minus_sqrt:
        fall = 1.0 - math.sqrt(1.0 - fall)
    if rise <= fall:
        return peak * rise
    return max(peak * fall, config.min_learning_rate)


def reaches_peak(*, step_tokens: int, total_tokens: int, config: ScheduleConfig) -> bool:
    """Whether some step of the run has the peak rate: the rise ends before the fall begins."""
    first_after_rise = max(0, math.ceil(config.warmup_tokens / step_tokens) - 1)
    return total_tokens - first_after_rise * step_tokens >= max(config.cooldown_tokens, 1)
