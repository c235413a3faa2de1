"""The run, its batches, its validation and its record. Torch-free."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum

from pretrain.errors import ConfigError
from pretrain.model.decoding import Decoding, Exit, StateStart


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """What a run is called, where it lives, and how long it lasts."""

    name: str
    """Names the run, its folder and its W&B page."""
    dir: str
    """The run folder; a folder that exists is resumed."""
    seed: int
    """Keys data order, depths, initial states and weights."""
    steps: int | None
    """Length in optimizer steps; or give tokens."""
    tokens: int | None
    """Length in tokens; or give steps."""

    def __post_init__(self) -> None:
        for name in ("name", "dir"):
            if not getattr(self, name).strip():
                raise ConfigError(
                    f"run.{name}={getattr(self, name)!r} is empty; give run.name=NAME, or "
                    "run.dir=FOLDER."
                )
        if (self.steps is None) == (self.tokens is None):
            raise ConfigError(
                f"run.steps={self.steps} and run.tokens={self.tokens}: give one of the two and "
                "set the other to null."
            )
        for name in ("steps", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"run.{name}={value} must be at least 1.")


@dataclass(kw_only=True, slots=True)
class BatchConfig:
    """Tokens of one optimizer step; accumulation follows from it and the number of ranks."""

    global_tokens: int
    """Tokens of one step over all ranks."""
    micro_rows: int
    """Rows of one forward and backward pass on one rank."""

    def __post_init__(self) -> None:
        for name in ("global_tokens", "micro_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"batch.{name}={getattr(self, name)} must be at least 1.")

    def rows(self, context: int) -> int:
        """Rows of one step. Raises ConfigError if rows of `context` tokens do not fill it."""
        if self.global_tokens % context:
            lower = max(self.global_tokens // context, 1) * context
            raise ConfigError(
                f"batch.global_tokens={self.global_tokens} is not a multiple of "
                f"model.context={context}.\n  Nearest: {lower} ({lower // context} rows) or "
                f"{lower + context} ({lower // context + 1} rows)."
            )
        return self.global_tokens // context

    def micro_steps(self, *, context: int, ranks: int) -> int:
        """Backward passes of one rank in a step. Raises ConfigError if it does not divide."""
        self.rows(context)
        unit = ranks * self.micro_rows * context
        if self.global_tokens % unit:
            lower, upper = self.global_tokens // unit, self.global_tokens // unit + 1
            near = " or ".join(
                f"{count * unit} ({count} micro-step{'s' * (count > 1)})"
                for count in (lower, upper)
                if count
            )
            raise ConfigError(
                f"batch.global_tokens={self.global_tokens} does not divide: {ranks} ranks x "
                f"batch.micro_rows={self.micro_rows} x model.context={context} = {unit} per "
                f"micro-step.\n  Nearest: {near}."
            )
        return self.global_tokens // unit


class WandbMode(Enum):
    """auto: online if there is a key, else offline."""

    auto = "auto"
    offline = "offline"
    disabled = "disabled"


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    """The record of a run. metrics.jsonl is always written; W&B is a copy."""

    wandb: WandbMode
    """auto: online if a key is at hand, else offline; offline; disabled."""
    project: str = "pretrain"
    """W&B project."""
    entity: str | None = None
    """W&B team or user; null: the key's default."""
    tags: list[str] = field(default_factory=list)
    """W&B tags."""
    tensorboard: bool = False
    """Whether <run.dir>/tensorboard gets a copy (pip install 'pretrain[tensorboard]')."""
    alert_cooldown_s: float = 1800.0
    """No two alerts of one kind within so many seconds."""
    part_norms_every_steps: int = 10
    """Measure the gradient's norm by part of the model every so many steps; 0: never."""
    sensors_every_s: float = 30.0
    """Read the sensors of NVIDIA GPUs so often, in seconds; 0: never."""

    def __post_init__(self) -> None:
        for name in ("alert_cooldown_s", "part_norms_every_steps", "sensors_every_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"logging.{name}={getattr(self, name)} must be 0 or more.")


@dataclass(kw_only=True, slots=True)
class AlarmConfig:
    """When a validation shows the signature of one of the two ways in which runs have failed.

    The limits lie between what `make train` and its failed variants measured, see EXPERIMENTS.md.
    """

    after_steps: int = 20
    """No alarm before: while frequencies of tokens are learned, healthy states agree as well."""
    collapse_correlation: float = 0.9
    """collapse: the tokens' states, or what the head sees of them, correlate at least so much."""
    ignored_gain_nats: float = 0.01
    """ignored_state: the loss at the mean depth is less than this below the loss at depth 1."""
    ignored_loss_share: float = 0.8
    """ignored_state: only below this share of ln V; who knows nothing yet needs no state."""

    def __post_init__(self) -> None:
        for name in ("collapse_correlation", "ignored_loss_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(
                    f"validation.alarms.{name}={getattr(self, name)} must be in (0, 1]."
                )
        for name in ("after_steps", "ignored_gain_nats"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(
                    f"validation.alarms.{name}={getattr(self, name)} must be 0 or more."
                )


@dataclass(kw_only=True, slots=True)
class ValidationConfig:
    """Held-out loss and the health of the recurrence during training."""

    every_steps: int
    """Validate after every so many steps, and at the end."""
    rows: int
    """Rows of the valid split to use; the same ones every time."""
    depths: list[int]
    """Depths to measure, all in one pass."""
    prompts: list[str] = field(default_factory=list)
    """Texts that are continued after each validation; [] for none, "" begins with nothing."""
    sample_depths: list[int] = field(default_factory=list)
    """Depths to continue each prompt at, side by side."""
    sample_tokens: int = 48
    """New tokens of each sample; all samples together cost so many short forward passes."""
    sample_temperature: float = 0.0
    """0: always the likeliest token."""
    alarms: AlarmConfig = field(default_factory=AlarmConfig)
    """Signatures of a failing recurrence."""

    def __post_init__(self) -> None:
        if self.every_steps < 1 or self.rows < 1:
            raise ConfigError(
                f"validation.every_steps={self.every_steps} and validation.rows={self.rows} "
                "must be at least 1."
            )
        if not self.depths or min(self.depths) < 1:
            raise ConfigError(f"validation.depths={self.depths} must name depths of 1 or more.")
        self._check_samples()

    def _check_samples(self) -> None:
        if self.sample_tokens < 1 or not 0 <= self.sample_temperature < math.inf:
            raise ConfigError(
                f"validation.sample_tokens={self.sample_tokens} must be at least 1, and "
                f"validation.sample_temperature={self.sample_temperature} 0 (greedy) or above."
            )
        if self.prompts and (not self.sample_depths or min(self.sample_depths) < 1):
            raise ConfigError(
                f"validation.sample_depths={self.sample_depths} must name depths of 1 or more to "
                "continue validation.prompts at; or set validation.prompts=[]."
            )


@dataclass(kw_only=True, slots=True)
class GenerateOptions:
    """How `pretrain generate` continues a prompt."""

    prompt: str
    """Text to continue."""
    num_steps: int
    """Iterations of the core per token: more of them think longer."""
    max_new_tokens: int
    """Stop after this many tokens."""
    temperature: float
    """0: always the likeliest token."""
    top_k: int
    """Sample among this many likeliest tokens; 0: all."""
    top_p: float
    """Sample among the likeliest tokens that hold this probability; 1: all."""
    seed: int
    """Keys the sampling and the initial states."""
    start: StateStart
    """Where each token's recurrence starts: random, as in training; zeros; warm, where the token
    before ended."""
    schedule: list[int]
    """Iterations of the first new tokens, in place of num_steps."""
    exit: Exit
    """What ends a token's iterations before num_steps; none: nothing."""
    exit_threshold: float | None
    """Exit below it (argmax_stability: from it on); null: the published default."""
    min_steps: int
    """No token exits before."""
    check_every: int
    """Iterations from one look at the criterion to the next."""
    cache_iterations: int | None
    """Keep keys and values of so many iterations per token; null: of all."""
    draft_steps: int | None
    """Draft tokens with so many iterations and verify them side by side: the same text."""
    lookahead: int
    """Tokens to draft before they are verified."""
    step: int | None = None
    """Which checkpoint; null: the newest."""

    def __post_init__(self) -> None:
        if self.top_k < 0:
            raise ConfigError(f"generate.top_k={self.top_k} must be 0 or more.")
        try:
            self.decoding(())
        except ConfigError as error:
            raise ConfigError(f"generate: {error}") from None

    def decoding(self, stop_ids: Collection[int], most_tokens: int | None = None) -> Decoding:
        """The same for the model, of at most so many tokens. Raises ConfigError if impossible."""
        new_tokens = min(self.max_new_tokens, most_tokens or self.max_new_tokens)
        return Decoding(
            num_steps=self.num_steps,
            max_new_tokens=new_tokens,
            schedule=tuple(self.schedule),
            exit=self.exit,
            exit_threshold=self.exit_threshold,
            min_steps=self.min_steps,
            check_every=self.check_every,
            draft_steps=self.draft_steps,
            lookahead=self.lookahead,
            temperature=self.temperature,
            top_k=self.top_k or None,
            top_p=self.top_p,
            seed=self.seed,
            stop_ids=stop_ids,
            start=self.start,
            cache_iterations=self.cache_iterations,
        )
