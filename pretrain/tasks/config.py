"""What `pretrain evaluate` measures, and how far generated code may go. Torch-free."""

from dataclasses import dataclass, field
from pathlib import Path

from pretrain.errors import ConfigError
from pretrain.model.decoding import Exit


@dataclass(kw_only=True, slots=True)
class CodeLimits:
    """What one generated program may use; reaching a limit is a failed item."""

    cpu_s: int = 10
    """Seconds of processor time."""
    wall_s: float = 60.0
    """Seconds by the clock: what waits uses no processor."""
    memory_bytes: int = 1 << 30
    """Address space, the interpreter's own included."""
    output_bytes: int = 1 << 20
    """What it may print before it is ended."""

    def __post_init__(self) -> None:
        for name in ("cpu_s", "wall_s", "output_bytes"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"evaluate.code.{name}={getattr(self, name)} must be above 0.")
        # an interpreter and the standard library need some 60 MB
        if self.memory_bytes < 1 << 27:
            raise ConfigError(
                f"evaluate.code.memory_bytes={self.memory_bytes} does not hold a Python "
                f"interpreter; give at least {1 << 27}."
            )


@dataclass(kw_only=True, slots=True)
class EvaluateOptions:
    """What `pretrain evaluate` measures: held-out loss, or tasks if there are any."""

    depths: list[int]
    """Depths to measure: likelihoods of all in one pass, text once for each."""
    rows: int
    """Rows of the valid split to use."""
    step: int | None = None
    """Which checkpoint; null: the newest."""
    tasks: list[str] = field(default_factory=list)
    """Files of items (JSON lines); none: the held-out loss."""
    items: int | None = None
    """So many items of each task, evenly spread over the file; null: all."""
    max_new_tokens: int = 256
    """The longest answer or program."""
    generate_rows: int = 16
    """Answers that are written side by side on one rank."""
    exit: Exit = Exit.none
    """What ends a token's iterations before the depth, where text is written at depths above 1."""
    exit_threshold: float | None = None
    """Exit below it (argmax_stability: from it on); null: the published default."""
    run_code: bool = False
    """Whether programs that the model wrote may be run, confined, to judge them."""
    code: CodeLimits = field(default_factory=CodeLimits)
    """Limits of each such program."""

    def __post_init__(self) -> None:
        if not self.depths or min(self.depths) < 1 or self.rows < 1:
            raise ConfigError(
                f"evaluate.depths={self.depths} must name depths of 1 or more, and "
                f"evaluate.rows={self.rows} must be at least 1."
            )
        if len(set(self.depths)) < len(self.depths):
            raise ConfigError(f"evaluate.depths={self.depths} names a depth twice.")
        for name in ("items", "max_new_tokens", "generate_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"evaluate.{name}={value} must be at least 1.")
        self._check_tasks()

    def _check_tasks(self) -> None:
        given = {
            f"items={self.items}": self.items is not None,
            f"exit={self.exit.value}": self.exit is not Exit.none,
            "run_code=true": self.run_code,
        }
        if not self.tasks and (idle := [name for name, is_given in given.items() if is_given]):
            raise ConfigError(
                f"evaluate.{', evaluate.'.join(idle)} would do nothing without evaluate.tasks; "
                "name files of items."
            )
        if self.exit is Exit.none and self.exit_threshold is not None:
            raise ConfigError(
                f"evaluate.exit_threshold={self.exit_threshold} would do nothing with "
                "evaluate.exit=none; name a criterion."
            )
        names = [Path(task).stem for task in self.tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(
                f"evaluate.tasks names {', '.join(twice)} more than once; what is found is kept "
                "by the file's name, so names must differ."
            )
