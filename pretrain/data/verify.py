"""The command `pretrain data verify`: read every byte of the shards and compare.

Size and sha256 of each shard, CRC32 of each member, ids below the vocabulary size, lengths that
fit their rows, padding where they end, and the counts of the manifest.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from rich.console import Console

from pretrain.config import TrainConfig
from pretrain.data.config import DataConfig
from pretrain.data.manifest import SPLITS, Manifest
from pretrain.data.progress import Progress
from pretrain.data.shards import ShardReader
from pretrain.data.store import ShardStore, open_manifest
from pretrain.data.table import print_manifest
from pretrain.errors import DataError


def main(config: TrainConfig) -> None:
    """Check all shards of config.data; raises DataError that lists all damage."""
    manifest = open_manifest(config.data)
    problems = verify(config.data, manifest)
    print_manifest(manifest, config.data.shards)
    if problems:
        raise DataError(
            f"{len(problems)} problems in the shards at {config.data.shards}:\n  "
            + "\n  ".join(problems)
        )
    Console().print("every byte is as the manifest says")


def verify(config: DataConfig, manifest: Manifest) -> list[str]:
    """What is wrong with the shards, in their order; nothing if all is well."""
    readers = list(_readers(config, manifest))
    problems: list[str] = []
    # threads: hashing and reading leave the interpreter to others
    with (
        Progress("verify", total=len(readers)) as progress,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        found = pool.map(lambda reader: check_shard(manifest, reader), readers)
        for reader, of_shard in zip(readers, found, strict=True):
            problems += of_shard
            progress.advance(read_bytes=reader.shard.bytes)
    return problems


def _readers(config: DataConfig, manifest: Manifest) -> Iterator[ShardReader]:
    for split in SPLITS:
        store = ShardStore(config, manifest, split)
        for number, source in enumerate(manifest.sources):
            for shard in range(len(source.split(split))):
                yield store.reader(number, shard)


class _Counts(NamedTuple):
    tokens: int
    documents: int


def check_shard(manifest: Manifest, reader: ShardReader) -> list[str]:
    """What is wrong with one shard."""
    shard, problems = reader.shard, []
    try:
        if (actual := reader.sha256()) != shard.sha256:
            problems.append(
                f"{shard.name}: sha256 is {actual[:16]}..., "
                f"the manifest says {shard.sha256[:16]}..."
            )
        counts = [
            _check_member(manifest, reader, member, problems)
            for member in range(reader.layout.members)
        ]
    except DataError as error:
        # missing or of another size: there is nothing more to read
        return [*problems, str(error)]
    finally:
        reader.close()
    if problems:
        return problems
    found = _Counts(*(sum(column) for column in zip(*counts, strict=True)))
    # an adopted tokenizer may read begin_text inside a document, where a piece of it may start
    if found.tokens != shard.tokens or found.documents < shard.documents:
        problems.append(
            f"{shard.name}: {found.tokens} tokens of {found.documents} documents, the manifest "
            f"says {shard.tokens} of {shard.documents}"
        )
    return problems


def _check_member(
    manifest: Manifest, reader: ShardReader, member: int, problems: list[str]
) -> _Counts:
    """Check one pair of members; tells problems by appending them."""
    name = f"{reader.shard.name}: member {member:06d}"
    try:
        token_bytes, length_bytes = reader.verify_member(member)
    except DataError as error:
        problems.append(str(error))
        return _Counts(0, 0)
    layout, special = reader.layout, manifest.tokenizer.special
    rows = layout.member_rows(member)
    tokens = np.frombuffer(token_bytes, dtype=manifest.dtype).reshape(rows, layout.row_tokens)
    lengths = np.frombuffer(length_bytes, dtype=np.uint32).reshape(rows, -1).astype(np.int64)
    used = lengths.sum(axis=1)
    if (highest := int(tokens.max())) >= manifest.tokenizer.vocabulary_size:
        problems.append(
            f"{name} has the id {highest}, the vocabulary {manifest.tokenizer.vocabulary_size}"
        )
    if (used < 1).any() or (used > layout.row_tokens).any() or _has_gap(lengths):
        problems.append(f"{name}: lengths of documents do not fit rows of {layout.row_tokens}")
        return _Counts(0, 0)
    is_padding = np.arange(layout.row_tokens) >= used[:, None]
    if (tokens[is_padding] != special["pad"]).any():
        problems.append(f"{name} has tokens other than padding after its last document")
    is_piece = lengths > 0
    starts = (np.cumsum(lengths, axis=1) - lengths)[is_piece]
    first = tokens[np.nonzero(is_piece)[0], starts]
    return _Counts(int(used.sum()), int((first == special["begin_text"]).sum()))


def _has_gap(lengths: np.ndarray) -> bool:
    """Whether a length follows a zero."""
    return bool(((lengths[:, 1:] > 0) & (lengths[:, :-1] == 0)).any())
