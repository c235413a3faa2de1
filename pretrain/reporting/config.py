"""What a report shows and how a live view behaves. Torch-free."""

from dataclasses import dataclass

from pretrain.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class ReportOptions:
    """What `pretrain report` writes."""

    to: str | None
    """The HTML file; null: report.html in the run folder."""
    compare: list[str]
    """Folders of other runs, drawn over this one."""
    states: bool
    """Load the newest checkpoint and draw how the states of a prompt's tokens move. Needs torch."""
    prompt: str
    """Text whose tokens are followed."""
    iterations: int
    """How often the core runs on it."""

    def __post_init__(self) -> None:
        if self.iterations < 2:
            raise ConfigError(
                f"report.iterations={self.iterations} must be at least 2: a path needs two points."
            )
        if self.states and not self.prompt.strip():
            raise ConfigError("report.states=true needs report.prompt='some text' to follow.")


@dataclass(kw_only=True, slots=True)
class TopOptions:
    """How `pretrain top` looks at a run."""

    once: bool
    """Print one frame and exit."""
    refresh_s: float
    """Seconds from one look at the folder to the next."""

    def __post_init__(self) -> None:
        if not 0.1 <= self.refresh_s <= 3600:
            raise ConfigError(f"top.refresh_s={self.refresh_s} must be within 0.1 and 3600.")
