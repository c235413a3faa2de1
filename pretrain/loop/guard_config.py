"""What watches over a run, and what it does when something is wrong. Torch-free."""

from dataclasses import dataclass, field

from pretrain.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class SpikeConfig:
    """The ladder against loss spikes: alert, drop the update, go back and pass the rows over.

    A step's score is (loss - median) / (1.4826 x median absolute deviation) of the good steps
    before it.
    """

    window_steps: int = 128
    """Good steps that a loss is compared with; no verdict before there are this many."""
    alert_score: float = 6.0
    """From this score on a step is said to be a spike, and does not count as good."""
    skip_score: float = 12.0
    """From this score on its update is dropped as well."""
    rewind_after: int = 8
    """Spikes in a row that end in going back to the checkpoint before them; 0: never."""
    max_rewinds: int = 3
    """Stop rather than go back more often than this in the life of a run."""

    def __post_init__(self) -> None:
        if self.window_steps < 8:
            raise ConfigError(f"guards.spike.window_steps={self.window_steps} must be at least 8.")
        if not 0 < self.alert_score <= self.skip_score:
            raise ConfigError(
                f"guards.spike.alert_score={self.alert_score:g} must be above 0 and at most "
                f"guards.spike.skip_score={self.skip_score:g}."
            )
        for name in ("rewind_after", "max_rewinds"):
            if getattr(self, name) < 0:
                raise ConfigError(f"guards.spike.{name}={getattr(self, name)} must be 0 or more.")


@dataclass(kw_only=True, slots=True)
class GuardConfig:
    """Limits beyond which a run speaks up, drops an update, or stops."""

    spike: SpikeConfig = field(default_factory=SpikeConfig)
    """Loss spikes."""
    stop_after_skips: int = 10
    """Stop after so many dropped updates in a row: the run will not mend itself."""
    save_on_skip: bool = True
    """Save after the first of a row of dropped updates, for `pretrain replay`."""
    stall_s: float = 1200.0
    """A rank that stays in one phase of a step for longer ends the job, with a verdict."""
    straggler_every_steps: int = 50
    """Compare the speed of the ranks over so many steps."""
    straggler_ratio: float = 1.2
    """Name ranks whose time per unit of work is above this multiple of the median."""
    host_growth_bytes: int = 4 << 30
    """Warn when a rank and its loader have grown by so much since its tenth step."""

    def __post_init__(self) -> None:
        for name in ("stop_after_skips", "straggler_every_steps", "host_growth_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"guards.{name}={getattr(self, name)} must be at least 1.")
        if not self.stall_s > 0:
            raise ConfigError(f"guards.stall_s={self.stall_s:g} must be above 0 seconds.")
        if not self.straggler_ratio > 1:
            raise ConfigError(f"guards.straggler_ratio={self.straggler_ratio:g} must be above 1.")
