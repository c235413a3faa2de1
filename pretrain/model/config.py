"""The shape of the model and the law of its depths. Torch-free, so that `plan` is quick."""

import math
from dataclasses import dataclass
from enum import Enum

from pretrain.errors import ConfigError

# The loss holds the logits of so many tokens at once: 1 GiB in float32 at a vocabulary of 65,536.
CHUNK_TOKENS = 4096
# The fused head holds them in the type of the weights only. With one chunk it makes no logits twice
# and needs no float32 sum of its weight's gradient.
FUSED_CHUNK_TOKENS = 8192

_LARGEST_SIGMA = 8

_COUNTS = (
    "width",
    "heads",
    "inner",
    "prelude_layers",
    "core_layers",
    "coda_layers",
    "vocabulary_size",
    "context",
)


class DocumentMask(Enum):
    """Whether a token may attend to earlier documents packed into its row."""

    causal = "causal"
    isolated = "isolated"


class Block(Enum):
    """Where a layer's norms stand."""

    sandwich = "sandwich"
    pre_norm = "pre_norm"


class ComputePath(Enum):
    """What runs the model: plain modules, the same compiled, or hand-written passes on kernels."""

    reference = "reference"
    compiled = "compiled"
    fused = "fused"


class ProductPrecision(Enum):
    """Of products with weights: that of training, or float8 with a scale for every row."""

    same = "same"
    fp8 = "fp8"


class Injection(Enum):
    """How an iteration joins the state with the embedded tokens."""

    linear = "linear"
    add = "add"


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """One recurrent-depth transformer: prelude, core that is iterated, coda.

    The fields from `block` on default to the published model; the failed runs that the paper
    reports (arXiv 2502.05171, section 4.3) chose otherwise, see conf/experiment/failed-run-*.yaml.
    """

    name: str
    """The preset's name; it goes into checkpoints and exports."""
    width: int
    """D, the width of the residual stream."""
    heads: int
    """H, attention heads; the head width is width / heads and must be even."""
    inner: int
    """I, the width inside the MLP; its first matrix has 2 I rows (gate, then up)."""
    prelude_layers: int
    """Layers that embed the tokens."""
    core_layers: int
    """Layers of one iteration of the core."""
    coda_layers: int
    """Layers that turn the last state into logits."""
    vocabulary_size: int
    """V, rows of the tied embedding."""
    context: int
    """T, tokens in a row."""
    rope_base: float = 50_000.0
    """Base of the rotary angles."""
    norm_epsilon: float = 1e-6
    """Added to the mean square inside RMSNorm."""
    documents: DocumentMask = DocumentMask.causal
    """causal: attend across documents packed in a row; isolated: mask them, positions restart."""
    block: Block = Block.sandwich
    """sandwich: a norm before each branch and one after each sum; pre_norm: only the former."""
    norm_gain: bool = True
    """Whether RMSNorm multiplies by a learned gain."""
    injection: Injection = Injection.linear
    """linear: adapter [s ; e] with a learned matrix; add: s + e."""
    embedding_scale: bool = True
    """Whether embedded tokens and the initial state are multiplied by sqrt(width)."""
    qk_bias: bool = True
    """Whether queries and keys get a learned bias."""
    digit_positions: int | None = None
    """Places of a number's digits with a learned vector each, counted from the number's first digit
    (arXiv 2405.17399); write numbers from their lowest digit on. null: digits are like all text."""
    path: ComputePath = ComputePath.reference
    """reference: plain PyTorch; compiled: layers by torch.compile; fused: hand-written passes."""
    no_grad_precision: ProductPrecision = ProductPrecision.same
    """Of iterations without gradient, in evaluation of all; fp8 needs path=fused, bf16 weights."""
    grad_precision: ProductPrecision = ProductPrecision.same
    """Of all else but the adapter, the head and weight gradients; fp8 needs path=fused."""

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}={getattr(self, name)} must be at least 1.")
        for name in ("rope_base", "norm_epsilon"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"model.{name}={getattr(self, name)} must be above 0.")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ConfigError(
                f"model.width={self.width} over model.heads={self.heads} must give an even whole "
                f"head width, not {self.width / self.heads:g}."
            )
        if self.digit_positions is not None and self.digit_positions < 1:
            raise ConfigError(
                f"model.digit_positions={self.digit_positions} must be at least 1, or null."
            )
        self._check_path()

    def _check_path(self) -> None:
        is_fused = self.path is ComputePath.fused
        for name in ("no_grad_precision", "grad_precision"):
            if getattr(self, name) is not ProductPrecision.same and not is_fused:
                raise ConfigError(
                    f"model.{name}={getattr(self, name).value} needs model.path=fused, not "
                    f"{self.path.value}."
                )
            if getattr(self, name) is ProductPrecision.fp8 and (self.width % 16 or self.inner % 16):
                raise ConfigError(
                    f"model.{name}=fp8 needs model.width and model.inner in multiples of 16, which "
                    f"GPUs multiply in float8, not {self.width} and {self.inner}."
                )
        unpublished = [
            f"model.{name}={value.value if isinstance(value, Enum) else value}"
            for name, value, published in (
                ("block", self.block, Block.sandwich),
                ("injection", self.injection, Injection.linear),
                ("norm_gain", self.norm_gain, True),
                ("qk_bias", self.qk_bias, True),
            )
            if value is not published
        ]
        if is_fused and unpublished:
            raise ConfigError(
                f"model.path=fused is written for the published model, not for "
                f"{', '.join(unpublished)}; take model.path=compiled."
            )

    @property
    def head_width(self) -> int:
        """K, the width of one attention head."""
        return self.width // self.heads

    @property
    def state_sigma(self) -> float:
        """Standard deviation, before the cut, of the initial state: that of an embedded token."""
        return math.sqrt(2 / 5) if self.embedding_scale else math.sqrt(2 / (5 * self.width))


class Law(Enum):
    """Distribution of one row's depth."""

    poisson_lognormal = "poisson_lognormal"
    fixed = "fixed"


class Scope(Enum):
    """What shares one depth: a row, a block of consecutive rows, or the whole step."""

    row = "row"
    block = "block"
    step = "step"


class Sampling(Enum):
    """stratified: a step covers the law's quantiles evenly; independent: plain draws."""

    stratified = "stratified"
    independent = "independent"


class Curriculum(Enum):
    """How the mean depth grows at the start of a run (arXiv 2511.07384)."""

    none = "none"
    linear = "linear"
    one_minus_sqrt = "one_minus_sqrt"


@dataclass(kw_only=True, slots=True)
class DepthConfig:
    """The law of depths and how its draws are dealt to rows (arXiv 2502.05171; dealing is ours)."""

    law: Law
    """poisson_lognormal: r = 1 + Poisson(LogNormal); fixed: r = mean."""
    mean: int
    """Mean of the Poisson rate (the depth's own mean is one more), or the fixed depth."""
    backprop: int
    """Gradient flows through the last min(backprop, r) iterations."""
    sigma: float = 0.5
    """Standard deviation of the rate's logarithm."""
    scope: Scope = Scope.row
    """What shares one depth."""
    sampling: Sampling = Sampling.stratified
    """How the draws of one step relate to each other."""
    lanes: int | None = None
    """Equal blocks of a step's rows that stratified draws give equal work; null: rows / 8."""
    block_rows: int = 1
    """Consecutive rows that share a depth under scope block."""
    curriculum: Curriculum = Curriculum.none
    """linear: the mean grows evenly; one_minus_sqrt: slowly at first, as 1 - sqrt(1 - progress)."""
    ramp_rows: int = 0
    """Global rows after which the mean is full."""

    def __post_init__(self) -> None:
        for name in ("mean", "backprop", "block_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"depth.{name}={getattr(self, name)} must be at least 1.")
        # far above, the mean would come from rates beyond the table, and nothing would say so
        if self.law is Law.poisson_lognormal and not 0 < self.sigma <= _LARGEST_SIGMA:
            raise ConfigError(
                f"depth.sigma={self.sigma} must be above 0 and at most {_LARGEST_SIGMA} (0.5 is "
                "published)."
            )
        is_dealt = self.scope is not Scope.step and self.sampling is Sampling.stratified
        if self.lanes is not None and not is_dealt:
            raise ConfigError(
                f"depth.lanes={self.lanes} would do nothing: only stratified draws for rows or "
                f"blocks are dealt to lanes, not depth.sampling={self.sampling.value} with "
                f"depth.scope={self.scope.value}. Set depth.lanes=null."
            )
        if self.block_rows != 1 and self.scope is not Scope.block:
            raise ConfigError(
                f"depth.block_rows={self.block_rows} would do nothing with "
                f"depth.scope={self.scope.value}. Set depth.scope=block or depth.block_rows=1."
            )
        if (self.curriculum is Curriculum.none) != (self.ramp_rows == 0) or self.ramp_rows < 0:
            raise ConfigError(
                f"depth.curriculum={self.curriculum.value} with depth.ramp_rows={self.ramp_rows}: "
                "a curriculum needs the rows that it lasts (1 or more), and none has 0."
            )
