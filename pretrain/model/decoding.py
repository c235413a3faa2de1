"""How a prompt is to be continued. Torch-free, so that commands can check it at once."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

from pretrain.errors import ConfigError


class StateStart(Enum):
    """random: s_0 as in training; zeros: s_0 = 0; warm: zeros for the prompt, then the last latent.

    The warm start is the paper's continuous chain of thought (arXiv 2502.05171, section 6.3).
    """

    random = "random"
    zeros = "zeros"
    warm = "warm"


class Exit(Enum):
    """What tells that a token has been thought about enough (arXiv 2502.05171, section 6.1)."""

    none = "none"
    kl = "kl"
    minp_kl = "minp-kl"
    entropy_diff = "entropy-diff"
    latent_diff = "latent-diff"
    cosine = "cosine"
    argmax_stability = "argmax-stability"

    @property
    def needs_logits(self) -> bool:
        """Whether it looks at the distribution of the next token, which costs a coda and a head."""
        return self not in (Exit.none, Exit.latent_diff, Exit.cosine)


DEFAULT_LOOKAHEAD = 8

# The published code's. All exit below but argmax_stability, which exits at so many checks or more.
DEFAULT_THRESHOLDS = {
    Exit.kl: 1e-3,
    Exit.minp_kl: 1e-5,
    Exit.entropy_diff: 1e-3,
    Exit.latent_diff: 0.03,
    Exit.cosine: 1e-3,
    Exit.argmax_stability: 5.0,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """How to continue a prompt. Raises ConfigError for what is out of range or would do nothing."""

    num_steps: int
    """Iterations of the core for every token; the most there may be if tokens exit."""
    max_new_tokens: int
    """Stop after so many tokens."""
    schedule: tuple[int, ...] = ()
    """In place of num_steps, for the first new tokens as they are read; the prompt keeps those."""
    exit: Exit = Exit.none
    """Stop iterating a token when this has fallen below its threshold; never in the prompt."""
    exit_threshold: float | None = None
    """None: the published default (`DEFAULT_THRESHOLDS`)."""
    min_steps: int = 1
    """No token exits before."""
    check_every: int = 1
    """Iterations from one look at the criterion to the next."""
    draft_steps: int | None = None
    """Draft tokens with so many iterations, then verify them at num_steps: the same text, faster
    where drafts are good."""
    lookahead: int = DEFAULT_LOOKAHEAD
    """Tokens to draft before they are verified in one pass."""
    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Choose among the k likeliest tokens."""
    top_p: float | None = None
    """Choose among the likeliest tokens whose probabilities sum to at least p."""
    seed: int = 0
    """Key of initial states and sampling draws."""
    stop_ids: Collection[int] = ()
    """A row ends with the first of these."""
    start: StateStart = StateStart.random
    """Where each token's recurrence starts."""
    cache_iterations: int | None = None
    """Bounds the cache to so many iterations (see `KeyValueCache`)."""

    @property
    def threshold(self) -> float:
        """The criterion's threshold, given or default."""
        if self.exit_threshold is not None:
            return self.exit_threshold
        return DEFAULT_THRESHOLDS[self.exit]

    @property
    def most_steps(self) -> int:
        """The most iterations that any token may get."""
        return max((self.num_steps, *self.schedule))

    def __post_init__(self) -> None:
        _check_counts(self)
        if not 0.0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature={self.temperature} must be 0 (greedy) or above.")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p={self.top_p} must lie in (0, 1], or be null.")
        _check_exit(self)
        if self.draft_steps is not None:
            _check_draft(self)
        elif self.lookahead != DEFAULT_LOOKAHEAD:
            raise ConfigError(f"lookahead={self.lookahead} would do nothing; set draft_steps.")


def _check_counts(options: Decoding) -> None:
    for name in (
        "num_steps", "max_new_tokens", "top_k", "cache_iterations", "min_steps", "check_every",
        "draft_steps", "lookahead",
    ):  # fmt: skip
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} must be at least 1.")
    if options.schedule and min(options.schedule) < 1:
        raise ConfigError(f"schedule={list(options.schedule)} must have numbers of 1 or more.")
    # The last new token is never read.
    if len(options.schedule) >= options.max_new_tokens:
        raise ConfigError(
            f"schedule has {len(options.schedule)} entries, but only the first "
            f"{options.max_new_tokens - 1} of max_new_tokens={options.max_new_tokens} are read "
            "again; shorten it."
        )


def _check_exit(options: Decoding) -> None:
    if options.exit is Exit.none:
        given = [
            f"{name}={value}"
            for name, value, unused in (
                ("exit_threshold", options.exit_threshold, None),
                ("min_steps", options.min_steps, 1),
                ("check_every", options.check_every, 1),
            )
            if value != unused
        ]
        if given:
            raise ConfigError(f"{', '.join(given)} would do nothing with exit=none; name one.")
        return
    if not 0.0 < options.threshold < math.inf:
        raise ConfigError(f"exit_threshold={options.threshold} must be above 0, or null.")
    if max(options.min_steps, options.check_every) >= options.most_steps:
        raise ConfigError(
            f"min_steps={options.min_steps} and check_every={options.check_every} leave no token "
            f"anything to exit from before {options.most_steps} iterations; lower them."
        )


def _check_draft(options: Decoding) -> None:
    assert options.draft_steps is not None
    if options.draft_steps >= options.num_steps:
        raise ConfigError(
            f"draft_steps={options.draft_steps} must be below num_steps={options.num_steps}: a "
            "draft is made to be cheaper than what verifies it."
        )
    clashes = {
        f"exit={options.exit.value}": options.exit is not Exit.none,
        f"schedule={list(options.schedule)}": bool(options.schedule),
        "start=warm": options.start is StateStart.warm,
        f"cache_iterations={options.cache_iterations}": options.cache_iterations is not None
        and options.cache_iterations < options.num_steps,
    }
    if found := [name for name, is_given in clashes.items() if is_given]:
        raise ConfigError(
            f"draft_steps={options.draft_steps} cannot be joined with {', '.join(found)}: tokens "
            "are verified side by side, all at num_steps, none waiting for another's last state."
        )
