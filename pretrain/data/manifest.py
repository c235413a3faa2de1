"""manifest.json: what a folder of shards holds. Its sha256 is the dataset's fingerprint.

It holds no date, host or path of the build, so equal input gives equal bytes.
"""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.errors import DataError

MANIFEST_FILE = "manifest.json"
SCHEMA = 1
SPLITS = ("train", "valid")
DTYPES = ("uint16", "uint32")

_SHARD_NAME = re.compile(r"[^/\\]+/(train|valid)-\d{6}\.tar")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardManifest:
    """One tar of rows; `name` is its path below the shard folder."""

    name: str
    bytes: int
    sha256: str
    rows: int
    tokens: int
    """Tokens that are not padding."""
    padding: int
    documents: int
    """Documents that begin here."""
    lengths_width: int
    """Columns of the members of document lengths: most pieces in one row."""
    tokens_crc32: list[int]
    """Of each member of tokens."""
    lengths_crc32: list[int]
    """Of each member of document lengths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Sums over shards."""

    shards: int
    bytes: int
    rows: int
    tokens: int
    padding: int
    documents: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceManifest:
    """One source: its shards by split, and where the text came from."""

    name: str
    licence: str
    provenance: str
    weight: float | None
    """As configured when the shards were built; a run's own configuration goes first."""
    corpus_sha256: str
    """Over the ids and texts of its documents, in order."""
    train: list[ShardManifest]
    valid: list[ShardManifest]

    def split(self, name: str) -> list[ShardManifest]:
        """Shards of the split `train` or `valid`."""
        return self.train if name == "train" else self.valid

    def totals(self, split: str) -> Totals:
        """Sums over the shards of a split."""
        shards = self.split(split)
        fields = ("bytes", "rows", "tokens", "padding", "documents")
        sums = {name: sum(getattr(shard, name) for shard in shards) for name in fields}
        return Totals(shards=len(shards), **sums)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerManifest:
    """The tokenizer that made the rows."""

    sha256: str
    vocabulary_size: int
    special: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All there is to know about a folder of shards."""

    tool: str
    context: int
    dtype: str
    rows_per_member: int
    tokenizer: TokenizerManifest
    settings: dict[str, Any]
    """What else decides the bytes: packing, split, sources."""
    sources: list[SourceManifest]
    fingerprint: str = field(default="", compare=False)
    """sha256 of manifest.json."""

    def source(self, name: str) -> SourceManifest:
        """The source of that name. Raises DataError naming those there are."""
        for source in self.sources:
            if source.name == name:
                return source
        names = ", ".join(source.name for source in self.sources)
        raise DataError(f"The shards have no source {name!r}; they have {names}.")

    def to_bytes(self) -> bytes:
        """The content of manifest.json."""
        content: dict[str, Any] = {"schema": SCHEMA, **dataclasses.asdict(self)}
        del content["fingerprint"]
        for source, written in zip(self.sources, content["sources"], strict=True):
            written["totals"] = {
                split: dataclasses.asdict(source.totals(split)) for split in SPLITS
            }
        return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, content: bytes, origin: str) -> "Manifest":
        """Read manifest.json; `origin` names it in errors.

        Raises DataError if it is damaged, of another schema, or contradicts itself.
        """
        try:
            raw = json.loads(content)
            schema = raw.pop("schema")
            if schema != SCHEMA:
                raise DataError(
                    f"{origin} has schema {schema}; this version reads {SCHEMA}. "
                    "Build the shards again, or use the version that wrote them."
                )
            raw["sources"] = [_read_source(source, origin) for source in raw["sources"]]
            raw["tokenizer"] = TokenizerManifest(**raw["tokenizer"])
            fingerprint = hashlib.sha256(content).hexdigest()
            manifest = cls(**raw, fingerprint=fingerprint)
            _check(manifest, origin)
        except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise DataError(
                f"{origin} is damaged ({type(error).__name__}: {error}); copy it again from where "
                "it was built, or remove the folder and build again."
            ) from error
        return manifest


def _read_source(raw: dict[str, Any], origin: str) -> SourceManifest:
    totals = raw.pop("totals")
    for split in SPLITS:
        raw[split] = [ShardManifest(**shard) for shard in raw[split]]
    source = SourceManifest(**raw)
    for split in SPLITS:
        if Totals(**totals[split]) != source.totals(split):
            raise DataError(
                f"{origin}: the totals of {source.name}/{split} are not the sums of its shards; "
                "the file was edited. Copy it again or build again."
            )
    return source


def _check(manifest: Manifest, origin: str) -> None:
    if manifest.dtype not in DTYPES:
        raise DataError(f"{origin}: dtype {manifest.dtype!r} is none of {', '.join(DTYPES)}.")
    for source in manifest.sources:
        for split in SPLITS:
            for shard in source.split(split):
                _check_shard(manifest, source.name, shard, origin)


def _check_shard(manifest: Manifest, source: str, shard: ShardManifest, origin: str) -> None:
    if not _SHARD_NAME.fullmatch(shard.name) or shard.name.split("/")[0] != source:
        raise DataError(f"{origin}: {shard.name!r} is no name of a shard of {source}.")
    members = -(-shard.rows // manifest.rows_per_member)
    if shard.rows < 1 or {len(shard.tokens_crc32), len(shard.lengths_crc32)} != {members}:
        raise DataError(
            f"{origin}: {shard.name} has {shard.rows} rows, hence {members} members, but "
            f"{len(shard.tokens_crc32)} and {len(shard.lengths_crc32)} checksums."
        )
    if shard.tokens + shard.padding != shard.rows * (manifest.context + 1):
        raise DataError(
            f"{origin}: {shard.name} has {shard.tokens} tokens and {shard.padding} of padding, "
            f"which is not {shard.rows} rows of {manifest.context + 1}."
        )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a local folder. Raises DataError if it is missing or damaged."""
    path = folder / MANIFEST_FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"There are no shards at {folder} (no {MANIFEST_FILE}): run `pretrain data build` "
            "with this configuration, or set data.shards to where they are."
        ) from None
    return Manifest.from_bytes(content, str(path))
