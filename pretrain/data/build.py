"""The command `pretrain data build`: raw text to shards and their manifest.

Parts of the text are tokenized in parallel, then each source is packed in order, so the bytes do
not depend on the number of processes. Everything grows in `.build` below the shard folder; a
killed build goes on from there. Shards appear only when all of them are whole, the manifest last.
Several jobs may tokenize side by side, each its share of the parts; one build then does the rest.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from errno import EDQUOT, ENOLCK, ENOSPC, ENOSYS, EOPNOTSUPP
from pathlib import Path
from typing import Any

from pretrain import __version__
from pretrain.config import TrainConfig
from pretrain.data.cache import is_url
from pretrain.data.config import DataConfig, SourceConfig
from pretrain.data.finished import INPUTS_FILE, Parts, build_settings, list_inputs, reuse
from pretrain.data.manifest import (
    MANIFEST_FILE,
    SPLITS,
    Manifest,
    ShardManifest,
    SourceManifest,
    TokenizerManifest,
    read_manifest,
)
from pretrain.data.parts import PartFiles, PartJob, PartRecord, commit, encode_parts
from pretrain.data.progress import Progress
from pretrain.data.sources import Part, find_parts
from pretrain.data.table import print_manifest
from pretrain.data.tokenizer import Tokenizer
from pretrain.data.write import Packing, write_split
from pretrain.errors import ConfigError, DataError

log = logging.getLogger(__name__)

WORK_FOLDER = ".build"
LOCK_FILE = "lock"
# what a mount without locks says of one: Lustre without -o flock, NFS without its lock service
NO_LOCKS = (ENOSYS, EOPNOTSUPP, ENOLCK)
# tar headers, lengths and padding beside the tokens; seen: 1 to 3 % at contexts from 512 on
OVERHEAD = 1.05


def main(config: TrainConfig) -> None:
    """Build the shards of config.data or a job's share of them, or say that they are there."""
    if config.data.build_task is not None:
        build_share(config.data, config.tokenizer.path)
        return
    manifest = build(config.data, config.tokenizer.path)
    print_manifest(manifest, config.data.shards)


def build(config: DataConfig, tokenizer_path: str) -> Manifest:
    """Build the shards of a configuration; returns at once if they are finished.

    Raises DataError if other shards are there, for bad text, and if the disk is full.
    """
    found = _find(config, tokenizer_path)
    if isinstance(found, Manifest):
        return found
    folder = Path(config.shards)
    with _locked(folder, fcntl.LOCK_EX), _explaining_full_disk(folder):
        return found.run()


def build_share(config: DataConfig, tokenizer_path: str) -> None:
    """Tokenize the parts of job config.build_task of config.build_tasks, beside the other jobs.

    Raises what `build` raises.
    """
    found = _find(config, tokenizer_path)
    folder = Path(config.shards)
    if isinstance(found, _Build):
        with _locked(folder, fcntl.LOCK_SH), _explaining_full_disk(folder):
            found.run_share()


def _find(config: DataConfig, tokenizer_path: str) -> "Manifest | _Build":
    """Finished shards that are the ones asked for, or the build that would make them."""
    if is_url(config.shards):
        raise ConfigError(
            f"data.shards={config.shards} is a URL; build into a folder, then copy it there as it "
            "is."
        )
    tokenizer = Tokenizer.load(tokenizer_path)
    folder = Path(config.shards)
    settings = build_settings(config, tokenizer)
    if (folder / MANIFEST_FILE).exists():
        manifest = reuse(config, settings, folder)
        _sweep(folder)
        return manifest
    parts = find_parts(config)
    for name in parts:
        if not name or name.startswith(".") or "/" in name or "\\" in name:
            raise ConfigError(
                f"Source {name!r} names a folder; it may not be empty, hold no /, and start with "
                "no dot."
            )
    return _Build(config, tokenizer_path, tokenizer, settings, parts)


def _sweep(folder: Path) -> None:
    """Remove what is left of a build that was killed as it cleared away."""
    work = folder / WORK_FOLDER
    if work.exists():
        # not where another build is about to find these shards, or where this user may not write
        with suppress(DataError), _locked(folder, fcntl.LOCK_EX) as is_locked:
            if is_locked:
                log.info("removing what an earlier build has left: %s", work)
                _clear_away(work)


def _clear_away(work: Path) -> None:
    """Remove all below the work folder, under its lock; `_locked` then removes the folder."""
    for folder in work.glob("*/"):
        shutil.rmtree(folder)
    (work / LOCK_FILE).unlink(missing_ok=True)


class _Build:
    """One build, in a work folder that is named by what decides its bytes."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer_path: str,
        tokenizer: Tokenizer,
        settings: dict[str, Any],
        parts: Parts,
    ) -> None:
        self._config = config
        self._tokenizer_path = tokenizer_path
        self._tokenizer = tokenizer
        self._settings = settings
        self._parts = parts
        self._inputs = list_inputs(parts)
        self._dtype = "uint16" if tokenizer.vocabulary_size <= 2**16 else "uint32"
        self._folder = Path(config.shards)
        key = json.dumps([settings, self._inputs, self._dtype, __version__], sort_keys=True)
        self._work = self._folder / WORK_FOLDER / hashlib.sha256(key.encode()).hexdigest()[:16]

    def run(self) -> Manifest:
        if self._is_overtaken():
            _clear_away(self._work.parent)
            return reuse(self._config, self._settings, self._folder)
        self._clear_others()
        self._work.mkdir(parents=True, exist_ok=True)
        records = self._tokenize([part for own in self._parts.values() for part in own])
        self._check_space(records)
        shards = self._pack(records)
        for split in shards.values():
            for shard in split["train"] + split["valid"]:
                self._move(shard)
        manifest = self._manifest(records, shards)
        if not any(source.valid for source in manifest.sources):
            log.warning(
                "no document of %s is held out, and training validates: raise data.valid_fraction="
                "%g, or name files in data.valid_paths, and build under another data.shards. A txt "
                "file is one document.",
                self._config.name,
                self._config.valid_fraction,
            )
        commit(self._folder / INPUTS_FILE, json.dumps(self._inputs, indent=1).encode())
        commit(self._folder / MANIFEST_FILE, manifest.to_bytes())
        _clear_away(self._work.parent)
        return read_manifest(self._folder)

    def run_share(self) -> None:
        """Leave the tokenized parts of one job of several where `run` finds them."""
        if self._is_overtaken():
            reuse(self._config, self._settings, self._folder)
            return
        task, tasks = self._config.build_task, self._config.build_tasks
        self._work.mkdir(parents=True, exist_ok=True)
        # dealt by size, whatever is done already: every job must come to the same shares
        dealt = sorted(
            (part for own in self._parts.values() for part in own),
            key=lambda part: (-part.stored_bytes, part.source, part.index),
        )
        records = self._tokenize(dealt[task::tasks])
        log.info("job %s of %d: %d of %d parts are there", task, tasks, len(records), len(dealt))

    def _is_overtaken(self) -> bool:
        """Whether another build has finished here before this one had the lock."""
        return (self._folder / MANIFEST_FILE).exists()

    def _clear_others(self) -> None:
        for other in self._work.parent.iterdir():
            if other.is_dir() and other != self._work:
                log.warning("removing an unfinished build of other settings or text: %s", other)
                shutil.rmtree(other)

    def _stem(self, part: Part) -> Path:
        return self._work / "parts" / part.source / f"{part.index:06d}"

    def _files(self, part: Part) -> PartFiles:
        return PartFiles(self._stem(part), self._dtype)

    def _tokenize(self, parts: list[Part]) -> dict[Part, PartRecord]:
        """Tokenize those of the parts that are not yet, in parallel."""
        records = {part: self._files(part).read_record() for part in parts}
        missing = [part for part in parts if records[part] is None]
        if len(missing) < len(parts):
            log.info("%d of %d parts were tokenized before", len(parts) - len(missing), len(parts))
        # the longest first, so that no process is left alone with one at the end
        missing.sort(key=lambda part: -part.stored_bytes)
        for source in self._parts:
            (self._work / "parts" / source).mkdir(parents=True, exist_ok=True)
        jobs = [
            PartJob(part, self._config, self._tokenizer_path, self._dtype, str(self._stem(part)))
            for part in missing
        ]
        with Progress("tokenize", total=sum(part.stored_bytes for part in missing)) as progress:
            for job, record in encode_parts(jobs, self._config.build_workers):
                records[job.part] = record
                progress.advance(
                    steps=job.part.stored_bytes, tokens=record.tokens, read_bytes=record.text_bytes
                )
        return {part: record for part, record in records.items() if record is not None}

    def _check_space(self, records: dict[Part, PartRecord]) -> None:
        tokens = sum(record.tokens for record in records.values())
        itemsize = 2 if self._dtype == "uint16" else 4
        # finished ones have a record, and may have found their place already
        names = [
            path.relative_to(self._work / "shards").with_suffix(".tar")
            for path in (self._work / "shards").glob("*/*.json")
        ]
        written = sum(
            path.stat().st_size
            for folder in (self._work / "shards", self._folder)
            for path in (folder / name for name in names)
            if path.exists()
        )
        needed = max(int(tokens * itemsize * OVERHEAD) - written, 0)
        free = shutil.disk_usage(self._work).free
        if needed > free:
            raise DataError(
                f"The shards of {tokens} tokens need about {needed} more bytes, {self._folder} has "
                f"{free} free. Make room and build again: it goes on where it stopped."
            )

    def _pack(self, records: dict[Part, PartRecord]) -> dict[str, dict[str, list[ShardManifest]]]:
        config = self._config
        packing = Packing(
            row_tokens=config.context + 1,
            pad=self._tokenizer.special.pad,
            pack_tokens=config.pack_tokens,
            rows_per_member=config.rows_per_member,
            members_per_shard=config.members_per_shard,
        )
        shards: dict[str, dict[str, list[ShardManifest]]] = {}
        tokens = sum(record.tokens for record in records.values())
        with Progress("pack", total=tokens) as progress:
            for source, parts in self._parts.items():
                files = [self._files(part) for part in parts]
                shards[source] = {split: [] for split in SPLITS}
                for split in SPLITS:
                    for shard in write_split(
                        files,
                        packing,
                        split=split,
                        source=source,
                        folder=self._work / "shards",
                        final_folder=self._folder,
                    ):
                        shards[source][split].append(shard)
                        progress.advance(steps=shard.tokens, tokens=shard.tokens)
        return shards

    def _move(self, shard: ShardManifest) -> None:
        """Give a finished shard its place, unless an earlier life of this build has."""
        target, origin = self._folder / shard.name, self._work / "shards" / shard.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if origin.exists():
            os.replace(origin, target)

    def _manifest(
        self,
        records: dict[Part, PartRecord],
        shards: dict[str, dict[str, list[ShardManifest]]],
    ) -> Manifest:
        tokenizer = self._tokenizer
        sources = []
        for name, parts in self._parts.items():
            digests = "".join(records[part].corpus_sha256 for part in parts)
            # without data.sources every folder is a source, and nothing more is known of it
            configured = self._config.sources.get(name, SourceConfig())
            sources.append(
                SourceManifest(
                    name=name,
                    licence=configured.licence,
                    provenance=configured.provenance,
                    weight=configured.weight,
                    corpus_sha256=hashlib.sha256(digests.encode()).hexdigest(),
                    **shards[name],
                )
            )
        if not any(source.train for source in sources):
            raise DataError(
                f"The corpus {self._config.name} gives no rows to train on: it is empty, or "
                f"data.valid_fraction={self._config.valid_fraction} and data.valid_paths="
                f"{self._config.valid_paths} hold all of it out."
            )
        return Manifest(
            tool=f"pretrain {__version__}",
            context=self._config.context,
            dtype=self._dtype,
            rows_per_member=self._config.rows_per_member,
            tokenizer=TokenizerManifest(
                sha256=tokenizer.sha256,
                vocabulary_size=tokenizer.vocabulary_size,
                special=tokenizer.special.known(),
            ),
            settings=self._settings,
            sources=sources,
        )


@contextmanager
def _locked(folder: Path, kind: int) -> Iterator[bool]:
    """One build at a time in a folder (LOCK_EX), or jobs that share one (LOCK_SH).

    Yields whether it is locked: some file systems have no locks, and that must not end a build.
    """
    work, is_locked = folder / WORK_FOLDER, True
    with ExitStack() as stack:
        # once the lock is closed: NFS keeps an open file that is removed, under another name
        stack.callback(_remove_if_empty, work)
        try:
            work.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(work / LOCK_FILE, "w"))
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"Another process builds shards in {folder}; wait for it, or end it."
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise DataError(
                    f"Shards cannot be built in {folder}: {error.strerror}. It must be a folder "
                    "that this user may write; choose another data.shards."
                ) from error
            log.warning(
                "%s has no file locks (%s), so nothing keeps two builds apart there: start one at "
                "a time. Jobs that share one (data.build_tasks) do not disturb each other.",
                folder,
                error.strerror,
            )
            is_locked = False
        yield is_locked


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def _explaining_full_disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (ENOSPC, EDQUOT):
            raise
        free = shutil.disk_usage(folder).free
        raise DataError(
            f"No space left for {error.filename or folder}: {free} bytes free (or a quota is "
            "reached). Make room and build again: it goes on where it stopped."
        ) from error
