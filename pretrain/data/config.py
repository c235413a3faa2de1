"""Where text comes from, how it becomes shards, and how shards are read. Torch-free."""

import math
from dataclasses import dataclass, field
from enum import Enum

from pretrain.errors import ConfigError


class Corpus(Enum):
    """Where documents come from."""

    embedded = "embedded"
    files = "files"
    addition = "addition"


class DigitOrder(Enum):
    """From which end the numbers of generated sums are written."""

    lowest = "lowest"
    highest = "highest"


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One source of documents and its share of training."""

    paths: list[str] = field(default_factory=list)
    """Globs below data.root (** allowed); only for corpus: files."""
    max_epochs: float | None = None
    """A run that would read the source more often than this does not start; null: any number."""
    weight: float | None = None
    """Share of training rows, relative to the other sources; null for all: by their tokens."""
    text_key: str | None = None
    """Key or column of the text, where it differs from data.text_key."""
    licence: str = ""
    """Kept in the manifest."""
    provenance: str = ""
    """Kept in the manifest: where the text came from."""

    def __post_init__(self) -> None:
        if self.weight is not None and not (math.isfinite(self.weight) and self.weight >= 0):
            raise ConfigError(
                f"A source's weight is {self.weight}; it must be a number of 0 or more, or null."
            )
        if self.max_epochs is not None and not 0 < self.max_epochs < math.inf:
            raise ConfigError(f"A source's max_epochs is {self.max_epochs}; it must be above 0.")


@dataclass(kw_only=True, slots=True)
class MilestoneConfig:
    """Other shares of the sources, from some point of the run on."""

    from_tokens: int
    """Tokens of the run before the change; rounded up to whole rows."""
    weights: dict[str, float]
    """The share of every source; 0: not read."""

    def __post_init__(self) -> None:
        if self.from_tokens < 1:
            raise ConfigError(
                f"data.milestones: from_tokens={self.from_tokens} must be at least 1; the shares "
                "at the start are those of data.sources."
            )
        if not all(math.isfinite(weight) and weight >= 0 for weight in self.weights.values()):
            raise ConfigError(
                f"data.milestones: weights={self.weights} must be numbers of 0 or more."
            )

    def first_row(self, context: int) -> int:
        """The global row from which on the weights hold."""
        return -(-self.from_tokens // context)


class OnDamage(Enum):
    """What happens when stored rows are missing or not what the manifest says."""

    error = "error"
    quarantine = "quarantine"


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Raw text, shards, and the order in which rows are read."""

    name: str
    """Names the corpus; part of default paths."""
    corpus: Corpus
    """embedded: text that ships with Python and its packages; files: a folder or URL; addition:
    generated sums."""
    root: str | None = None
    """Folder or fsspec URL that source globs are relative to (corpus: files)."""
    text_key: str = "text"
    """Key (jsonl) or column (parquet) that holds a document's text."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Sources by name; empty: every folder directly below root is one."""
    shards: str
    """Folder or fsspec URL of the built shards and their manifest."""
    context: int
    """Tokens in a row; a stored row has one more, so that every input has its label."""
    valid_fraction: float = 0.01
    """Share of documents, chosen by the hash of their id, that is held out."""
    valid_paths: list[str] = field(default_factory=list)
    """Globs below data.root: whole files that are held out, besides that share of the others."""
    max_bytes: int | None = None
    """Stop reading a source after this many bytes of text; null: read all."""
    max_digits: int | None = None
    """Digits of the longest operand (corpus: addition); each length from 1 on is as likely."""
    digit_order: DigitOrder = DigitOrder.lowest
    """lowest: sums can be worked out as they are written; highest: all carries come first."""
    rows_per_member: int = 64
    """K, packed rows in one tar member."""
    members_per_shard: int = 128
    """Members in one shard, except a source's last."""
    pack_tokens: int = 4_194_304
    """Tokens of documents that best-fit packing looks at together."""
    build_workers: int = 0
    """Processes that tokenize; 0: as many as there are cores."""
    build_tasks: int = 1
    """Jobs that share the tokenizing; one build without build_task then packs what they made."""
    build_task: int | None = None
    """Which of these jobs this is, from 0: tokenize its share and stop; null: build to the end."""
    loader_workers: int = 1
    """Processes that read rows for one rank; 0: the training process reads them itself."""
    window_shards: int = 16
    """Shards whose rows are shuffled together."""
    milestones: list[MilestoneConfig] = field(default_factory=list)
    """Other shares of the sources from later points of the run on, ascending."""
    on_damage: OnDamage = OnDamage.error
    """error: stop; quarantine: damaged rows become padding, are counted and named."""
    quarantine_rows: int = 1000
    """Stop when so many rows of the run have been lost (on_damage: quarantine)."""
    cache: str = ""
    """Folder for copies of remote shards on a node; needed if shards is a URL.

    $NAME in it is the node's own variable, looked up where the run reads; $TMPDIR is always set.
    """
    cache_bytes: int = 200_000_000_000
    """Remove the least recently used copies beyond this size."""

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_places()
        self._check_sources()

    def _check_numbers(self) -> None:
        if not 0 <= self.valid_fraction < 1:
            raise ConfigError(f"data.valid_fraction={self.valid_fraction} must be in [0, 1).")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ConfigError(f"data.max_bytes={self.max_bytes} must be at least 1, or null.")
        for name in (
            "rows_per_member",
            "members_per_shard",
            "window_shards",
            "context",
            "pack_tokens",
            "cache_bytes",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name}={getattr(self, name)} must be at least 1.")
        starts = [milestone.from_tokens for milestone in self.milestones]
        if starts != sorted(set(starts)):
            raise ConfigError(f"data.milestones begin at {starts} tokens; they must ascend.")
        if self.build_tasks < 1 or not 0 <= (self.build_task or 0) < self.build_tasks:
            raise ConfigError(
                f"data.build_task={self.build_task} is not one of data.build_tasks="
                f"{self.build_tasks} jobs: give null, or 0 to {max(self.build_tasks, 1) - 1}."
            )
        for name in ("build_workers", "loader_workers", "quarantine_rows"):
            if getattr(self, name) < 0:
                raise ConfigError(f"data.{name}={getattr(self, name)} must be 0 or more.")

    def _check_places(self) -> None:
        if self.shards.startswith("pipe:"):
            raise ConfigError(
                f"data.shards={self.shards}: commands are not run to read data; "
                "give a folder or an fsspec URL (s3://, gs://, https://)."
            )
        if self.corpus is Corpus.files and not self.root:
            raise ConfigError(
                f"data={self.name} reads files and needs data.root=FOLDER (or a URL)."
            )
        if self.corpus is not Corpus.files and self.root is not None:
            raise ConfigError(
                f"data.root={self.root} is set, but the {self.corpus.value} corpus reads no "
                "folder; choose data=files."
            )
        if self.corpus is not Corpus.files and self.valid_paths:
            raise ConfigError(
                f"data.valid_paths={self.valid_paths} is set, but the {self.corpus.value} corpus "
                "reads no files; remove it, or choose data=files."
            )
        self._check_addition()

    def _check_addition(self) -> None:
        if self.corpus is not Corpus.addition:
            idle = {
                f"max_digits={self.max_digits}": self.max_digits is not None,
                f"digit_order={self.digit_order.value}": self.digit_order is DigitOrder.highest,
            }
            if given := [name for name, is_given in idle.items() if is_given]:
                raise ConfigError(
                    f"data.{given[0]} would do nothing with data.corpus={self.corpus.value}; "
                    "choose data=addition, or leave it out."
                )
        elif self.max_digits is None or self.max_digits < 1 or self.max_bytes is None:
            raise ConfigError(
                f"The addition corpus has sums without end; it needs data.max_digits of 1 or more, "
                f"not {self.max_digits}, and data.max_bytes, not {self.max_bytes}."
            )

    def _check_sources(self) -> None:
        if self.corpus is not Corpus.files:
            for name, source in self.sources.items():
                for key in ("paths", "text_key"):
                    if getattr(source, key):
                        raise ConfigError(
                            f"data.sources.{name}.{key}={getattr(source, key)} is set, but the "
                            f"{self.corpus.value} corpus reads no files; remove it, or choose "
                            "data=files."
                        )
        weighted = sorted(n for n, source in self.sources.items() if source.weight is not None)
        others = sorted(self.sources.keys() - set(weighted))
        if weighted and others:
            raise ConfigError(
                f"data.sources: {', '.join(others)} have no weight, {', '.join(weighted)} do; "
                "give all of them a weight (0: not read), or none."
            )
        if weighted and not any(self.sources[name].weight for name in weighted):
            raise ConfigError(
                f"data.sources: {', '.join(weighted)} all have the weight 0; give at least one a "
                "weight above 0, or none a weight."
            )


@dataclass(kw_only=True, slots=True)
class TokenizerConfig:
    """A tokenizer, and how it is trained unless it was adopted with published weights."""

    path: str
    """Folder of the tokenizer and tokenizer_info.json (hash, special ids, how it was made)."""
    vocabulary_size: int
    """Pieces, special ones included; at most model.vocabulary_size."""
    train_bytes: int | None = None
    """Text to learn pieces from, taken by the sources' weights; null: 1000 bytes a piece."""
    character_coverage: float = 0.9999
    """Share of characters that get pieces of their own; bytes cover the rest."""
    threads: int = 0
    """Threads for training; 0: as many as there are cores."""

    def __post_init__(self) -> None:
        if self.train_bytes is not None and self.train_bytes < 1:
            raise ConfigError(
                f"tokenizer.train_bytes={self.train_bytes} must be 1 or more, or null."
            )
        if not 0 < self.character_coverage <= 1:
            raise ConfigError(
                f"tokenizer.character_coverage={self.character_coverage} must be in (0, 1]."
            )
        if self.vocabulary_size < 1:
            raise ConfigError(
                f"tokenizer.vocabulary_size={self.vocabulary_size} must be at least 1."
            )
        if self.threads < 0:
            raise ConfigError(f"tokenizer.threads={self.threads} must be 0 or more.")


@dataclass(kw_only=True, slots=True)
class InspectConfig:
    """What `pretrain data inspect` shows."""

    row: int
    """Global row of the training stream to decode."""

    def __post_init__(self) -> None:
        if self.row < 0:
            raise ConfigError(f"inspect.row={self.row} must be 0 or more.")
