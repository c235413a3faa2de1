"""The whole configuration as a tree of dataclasses; `compose` turns YAML and overrides into it."""

import dataclasses
from enum import Enum

from pretrain.data.config import DataConfig, InspectConfig, TokenizerConfig
from pretrain.engine.config import CheckpointConfig, EngineConfig, Precision
from pretrain.errors import ConfigError
from pretrain.harness.config import HarnessOptions
from pretrain.jobs.config import ClusterConfig, SubmitOptions, SweepOptions
from pretrain.loop.config import (
    BatchConfig,
    GenerateOptions,
    LoggingConfig,
    RunConfig,
    ValidationConfig,
)
from pretrain.loop.guard_config import GuardConfig
from pretrain.model.config import ComputePath, DepthConfig, ModelConfig, ProductPrecision
from pretrain.optim.config import OptimizerConfig, ScheduleConfig
from pretrain.preflight.config import DoctorOptions
from pretrain.reporting.config import ReportOptions, TopOptions
from pretrain.tasks.config import EvaluateOptions


@dataclasses.dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Everything a run depends on."""

    run: RunConfig
    model: ModelConfig
    depth: DepthConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    engine: EngineConfig
    checkpoint: CheckpointConfig
    validation: ValidationConfig
    guards: GuardConfig
    logging: LoggingConfig
    cluster: ClusterConfig

    def __post_init__(self) -> None:
        rows = self.batch.rows(self.model.context)
        if self.data.context != self.model.context:
            raise ConfigError(
                f"data.context={self.data.context} and model.context={self.model.context} differ; "
                "rows are packed for one context."
            )
        if self.tokenizer.vocabulary_size > self.model.vocabulary_size:
            raise ConfigError(
                f"tokenizer.vocabulary_size={self.tokenizer.vocabulary_size} does not fit into "
                f"model.vocabulary_size={self.model.vocabulary_size}."
            )
        if self.schedule.min_learning_rate > self.optimizer.learning_rate:
            raise ConfigError(
                f"schedule.min_learning_rate={self.schedule.min_learning_rate} is above the peak, "
                f"optimizer.learning_rate={self.optimizer.learning_rate}."
            )
        if self.model.path is ComputePath.compiled and self.engine.zero_stage == 3:
            raise ConfigError(
                "model.path=compiled with engine.zero_stage=3 has trained silently wrong (a "
                "compiled step inside a module whose weights are gathered); take "
                "engine.zero_stage=2 or model.path=fused."
            )
        self._check_float8()
        self._check_dealing(rows)

    def _check_float8(self) -> None:
        for name in ("no_grad_precision", "grad_precision"):
            is_float8 = getattr(self.model, name) is ProductPrecision.fp8
            if is_float8 and self.engine.precision is not Precision.bf16:
                raise ConfigError(
                    f"model.{name}=fp8 needs engine.precision=bf16, not "
                    f"{self.engine.precision.value}: float8 products give bf16."
                )

    def _check_dealing(self, rows: int) -> None:
        shared, lanes = self.depth.block_rows, self.depth.lanes
        for name, value, places, what in (
            ("block_rows", shared, rows, "rows"),
            ("lanes", 1 if lanes is None else lanes, rows // shared, "rows or blocks"),
        ):
            if value < 1 or places % value:
                near = " or ".join(map(str, _nearest_divisors(places, value)))
                raise ConfigError(
                    f"depth.{name}={value} does not divide the {places} {what} of a step; take "
                    f"{near}."
                )

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step over all ranks."""
        return self.batch.rows(self.model.context)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.run.steps is not None:
            return self.run.steps
        assert self.run.tokens is not None
        return -(-self.run.tokens // self.batch.global_tokens)

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.total_steps * self.batch.global_tokens


def _nearest_divisors(number: int, value: int) -> list[int]:
    """The divisors of a number that are nearest to a value, below and above it."""
    divisors = [each for each in range(1, number + 1) if number % each == 0]
    below = [each for each in divisors if each < value]
    above = [each for each in divisors if each > value]
    return [*below[-1:], *above[:1]]


@dataclasses.dataclass(kw_only=True, slots=True)
class InspectTrainConfig(TrainConfig):
    """A run's configuration and which of its rows to look at."""

    inspect: InspectConfig


@dataclasses.dataclass(kw_only=True, slots=True)
class DoctorConfig(TrainConfig):
    """A run's configuration and how far to look before it starts."""

    doctor: DoctorOptions


@dataclasses.dataclass(kw_only=True, slots=True)
class SubmitConfig(TrainConfig):
    """A run's configuration and how it is submitted."""

    submit: SubmitOptions

    def run_config(self) -> TrainConfig:
        """What the run itself depends on."""
        names = [field.name for field in dataclasses.fields(TrainConfig)]
        return TrainConfig(**{name: getattr(self, name) for name in names})


@dataclasses.dataclass(kw_only=True, slots=True)
class SweepConfig:
    """The sweep that a command is about."""

    sweep: SweepOptions


@dataclasses.dataclass(kw_only=True, slots=True)
class RunFolderConfig:
    """The run that a command reads."""

    dir: str
    """The run folder."""


@dataclasses.dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """Held-out loss, or scores on tasks, of a trained run at several depths."""

    run: RunFolderConfig
    evaluate: EvaluateOptions


@dataclasses.dataclass(kw_only=True, slots=True)
class HarnessConfig:
    """Files of items that become tasks of lm-evaluation-harness."""

    harness: HarnessOptions


@dataclasses.dataclass(kw_only=True, slots=True)
class ReportConfig:
    """A run, alone or beside others, as a page."""

    run: RunFolderConfig
    report: ReportOptions


@dataclasses.dataclass(kw_only=True, slots=True)
class TopConfig:
    """A run, as it goes."""

    run: RunFolderConfig
    top: TopOptions


@dataclasses.dataclass(kw_only=True, slots=True)
class SyncConfig:
    """The run whose record becomes a W&B run on disk."""

    run: RunFolderConfig


@dataclasses.dataclass(kw_only=True, slots=True)
class ReplayConfig:
    """The batch of one step of a run, row by row."""

    run: RunFolderConfig
    step: int
    """The step whose rows are run again."""
    rows: list[int]
    """Global rows of it to run; empty: all."""

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ConfigError(f"step={self.step} must be at least 1.")


@dataclasses.dataclass(kw_only=True, slots=True)
class GenerateConfig:
    """Text from a trained run."""

    run: RunFolderConfig
    generate: GenerateOptions


@dataclasses.dataclass(kw_only=True, slots=True)
class AdoptConfig(TrainConfig):
    """A run's configuration and the published weights that it starts from."""

    hf: str
    """Folder with config.json, safetensors and tokenizer.json."""


class ExportDtype(Enum):
    """In what precision exported weights are stored."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclasses.dataclass(kw_only=True, slots=True)
class ExportOptions:
    """What is exported, and where to."""

    to: str
    """Folder to write; it must not be there yet, or be empty."""
    dtype: ExportDtype
    """float32 keeps the master weights as they are; bfloat16 rounds them."""
    moments: bool
    """Whether to add optimizer.safetensors, from which `pretrain adopt` goes on exactly."""
    step: int | None
    """Which checkpoint; null: the newest."""


@dataclasses.dataclass(kw_only=True, slots=True)
class ExportConfig:
    """A trained run as a Hugging Face folder."""

    run: RunFolderConfig
    export: ExportOptions
