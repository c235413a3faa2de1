"""The layout of a shard, and reading its rows by offset, verified.

A shard is a plain tar. Member pairs `000000.lengths.npy`, `000000.tokens.npy` hold K rows each:
tokens [K, context + 1] and the lengths of the pieces of documents in each row, zero padded. All
pairs have one size (the last may have fewer rows), so a row's place is arithmetic.
"""

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pretrain.data.manifest import Manifest, ShardManifest
from pretrain.errors import DamageError, UnreachableError

TAR_BLOCK = 512
# tarfile fills the end of an archive up to this
TAR_RECORD = 10_240
# of both arrays, whatever their shape: numpy pads the header to a multiple of 64
NPY_HEADER_BYTES = 128
LENGTH_BYTES = 4
FIND_ATTEMPTS = 3


def _padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the rows of one shard are. Sizes and offsets in bytes."""

    rows: int
    rows_per_member: int
    row_tokens: int
    token_bytes: int
    lengths_width: int

    @classmethod
    def of(cls, manifest: Manifest, shard: ShardManifest) -> "Layout":
        """The layout that a manifest implies."""
        return cls(
            rows=shard.rows,
            rows_per_member=manifest.rows_per_member,
            row_tokens=manifest.context + 1,
            token_bytes=np.dtype(manifest.dtype).itemsize,
            lengths_width=shard.lengths_width,
        )

    @property
    def members(self) -> int:
        """Member pairs."""
        return -(-self.rows // self.rows_per_member)

    @property
    def tokens_stride(self) -> int:
        """Bytes of one row of tokens."""
        return self.row_tokens * self.token_bytes

    @property
    def lengths_stride(self) -> int:
        """Bytes of one row of lengths."""
        return self.lengths_width * LENGTH_BYTES

    def member_rows(self, member: int) -> int:
        """Rows in a member: K, or what is left for the last."""
        return min(self.rows_per_member, self.rows - member * self.rows_per_member)

    def lengths_member(self, member: int) -> tuple[int, int]:
        """Offset and size of a member of lengths, without its tar header."""
        size = NPY_HEADER_BYTES + self.member_rows(member) * self.lengths_stride
        return member * self._pair_stride() + TAR_BLOCK, size

    def tokens_member(self, member: int) -> tuple[int, int]:
        """Offset and size of a member of tokens, without its tar header."""
        offset, size = self.lengths_member(member)
        tokens = NPY_HEADER_BYTES + self.member_rows(member) * self.tokens_stride
        return offset + _padded(size, TAR_BLOCK) + TAR_BLOCK, tokens

    @property
    def shard_bytes(self) -> int:
        """Size of the whole tar."""
        offset, size = self.tokens_member(self.members - 1)
        return _padded(offset + _padded(size, TAR_BLOCK) + 2 * TAR_BLOCK, TAR_RECORD)

    def _pair_stride(self) -> int:
        lengths = NPY_HEADER_BYTES + self.rows_per_member * self.lengths_stride
        tokens = NPY_HEADER_BYTES + self.rows_per_member * self.tokens_stride
        return 2 * TAR_BLOCK + _padded(lengths, TAR_BLOCK) + _padded(tokens, TAR_BLOCK)


class RowBytes(NamedTuple):
    """One row as stored: its tokens, and the lengths of its pieces of documents."""

    tokens: bytes
    lengths: bytes


class ShardReader:
    """Reads rows of one local shard; every member is checked when it is first touched.

    `find` gives the file's path, again after `close`: a copy may have left the cache meanwhile.
    """

    def __init__(self, manifest: Manifest, shard: ShardManifest, find: Callable[[], Path]) -> None:
        self.shard = shard
        self.layout = Layout.of(manifest, shard)
        self._find = find
        self._file: int | None = None
        self._is_verified = np.zeros(self.layout.members, dtype=bool)

    def read(self, row: int) -> RowBytes:
        """Row `row` of the shard. Raises DamageError if its member is damaged."""
        member, inside = divmod(row, self.layout.rows_per_member)
        if not self._is_verified[member]:
            self.verify_member(member)
        tokens, lengths = self.layout.tokens_stride, self.layout.lengths_stride
        tokens_start = self.layout.tokens_member(member)[0] + NPY_HEADER_BYTES
        lengths_start = self.layout.lengths_member(member)[0] + NPY_HEADER_BYTES
        return RowBytes(
            self._bytes(tokens_start + inside * tokens, tokens),
            self._bytes(lengths_start + inside * lengths, lengths),
        )

    def verify_member(self, member: int) -> tuple[bytes, bytes]:
        """Check both members of a pair; returns their arrays' bytes (tokens, lengths)."""
        tokens = self._checked("tokens", member, self.layout.tokens_member(member))
        lengths = self._checked("lengths", member, self.layout.lengths_member(member))
        self._is_verified[member] = True
        return tokens[NPY_HEADER_BYTES:], lengths[NPY_HEADER_BYTES:]

    def close(self) -> None:
        """Give the file descriptor back; the next read opens again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _checked(self, kind: str, member: int, place: tuple[int, int]) -> bytes:
        content = self._bytes(*place)
        expected = (self.shard.tokens_crc32 if kind == "tokens" else self.shard.lengths_crc32)[
            member
        ]
        actual = zlib.crc32(content)
        if actual != expected:
            raise DamageError(
                f"{self.shard.name}: member {member:06d}.{kind}.npy is damaged: its CRC32 is "
                f"{actual:08x}, the manifest says {expected:08x}. Copy {self._find()} again (in "
                "data.cache: remove it), or remove the shard folder and build again; "
                "`pretrain data verify` lists all damage."
            )
        return content

    def _bytes(self, offset: int, size: int) -> bytes:
        with self._naming_the_file():
            content = os.pread(self._descriptor(), size, offset)
        if len(content) != size:
            raise DamageError(
                f"{self.shard.name}: {size} bytes wanted at offset {offset}, {len(content)} there; "
                "the file became shorter while it was read."
            )
        return content

    def sha256(self) -> str:
        """Of the whole file as it is."""
        with (
            self._naming_the_file(),
            open(self._descriptor(), "rb", closefd=False) as file,
        ):
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest()

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UnreachableError(
                f"{self.shard.name} cannot be read: {error}. Look at that disk or mount of "
                f"{os.uname().nodename}; the shard itself may be whole."
            ) from error

    def _descriptor(self) -> int:
        if self._file is None:
            file = self._open()
            size = os.fstat(file).st_size
            if size != self.shard.bytes or size != self.layout.shard_bytes:
                os.close(file)
                raise DamageError(
                    f"{self.shard.name} has {size} bytes, the manifest says {self.shard.bytes}: "
                    "it is truncated or another file. Copy it again, or remove the folder and "
                    "build again."
                )
            self._file = file
        return self._file

    def _open(self) -> int:
        # a cached copy may be removed between finding and opening it; then it is fetched again
        for _ in range(FIND_ATTEMPTS):
            path = self._find()
            try:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError):
                continue
        raise DamageError(
            f"{self.shard.name} is missing (looked at {path}); copy it again from where the shards "
            "were built, or remove the folder and build again."
        )
