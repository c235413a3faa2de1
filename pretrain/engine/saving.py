"""Writing checkpoints, beside training or while it waits; by the protocol of `commit`.

`Saver` copies what a rank holds into host memory, and a thread writes and hashes that while
training goes on. Training asks at each step boundary, in a sum that it makes anyway, whether all
ranks have written; then all meet and rank 0 commits. At most one save is on its way.
"""

import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pretrain import __version__
from pretrain.engine import commit, fragments
from pretrain.engine.agreement import on_main, together
from pretrain.engine.available_memory import available_bytes
from pretrain.engine.config import CheckpointConfig
from pretrain.engine.deepspeed import Engine
from pretrain.engine.fragments import MASTER, FileRecord
from pretrain.engine.partitions import check_complete, check_same_tensors
from pretrain.engine.world import World
from pretrain.errors import CheckpointError
from pretrain.optim.slices import TensorInfo

log = logging.getLogger(__name__)

# Manifest, state, and what a filesystem needs to name the files.
SPARE_BYTES = 4 << 20
# Of the memory that is available on a host, copies of all its ranks together may take this share.
COPY_SHARE = 0.8

Written = tuple[str, FileRecord, dict[str, tuple[int, int]]]


class Saved(NamedTuple):
    """A committed checkpoint."""

    path: Path
    step: int
    bytes: int
    """Of all its files."""
    copied_s: float
    """How long training waited for the copy into host memory; 0 if it waited for the write."""
    written_s: float
    """How long the slowest rank wrote."""


class Saver:
    """Saves the checkpoints of one engine; all ranks call every method together.

    `fence` is called on rank 0 before a save begins and right before it is published, and raises
    CheckpointError if this process may no longer write into the run folder.
    """

    def __init__(
        self,
        engine: Engine,
        world: World,
        run_dir: Path,
        *,
        asynchronous: bool = False,
        fence: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine, self._world, self._run_dir = engine, world, run_dir
        self._copies = HostCopies() if asynchronous else None
        self._fence = fence
        self._flight: _Flight | None = None
        self._last: Saved | None = None

    @property
    def is_in_flight(self) -> bool:
        """Whether a save has begun and is not committed yet."""
        return self._flight is not None

    @property
    def step_in_flight(self) -> int | None:
        """The step whose save has begun and is not committed yet; None: there is none."""
        return None if self._flight is None else commit.step_of(self._flight.final)

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes; when no rank does, `finish` does not wait."""
        return self._flight is not None and self._flight.write.is_running

    def begin(self, step: int, state: dict[str, Any], *, beside: bool = True) -> None:
        """Start to save what the engine holds after `step` steps; `state` (rank 0's) must be JSON.

        Not `beside` training: on return all is written, without a copy.
        Raises CheckpointError on every rank if one has no room or cannot begin: nothing has
        changed then. Finish the save before first.
        """
        assert self._flight is None, "one save at a time"
        final = commit.step_folder(self._run_dir, step)
        token = self._world.broadcast_object(os.urandom(4).hex() if self._world.is_main else None)
        temporary = final.with_name(f"{final.name}.tmp-{token}")
        pieces = list(_own_pieces(self._engine))
        _check_space(self._world, self._run_dir, fragments.size_of(pieces))

        def make_room() -> None:
            self._fence()
            commit.make_temporary(temporary)

        on_main(self._world, make_room)
        started, copied_s = time.monotonic(), 0.0
        is_copied = False
        if beside and self._copies is not None and self._copies.fit(self._world, pieces):
            is_copied = True
            pieces = self._copies.take(pieces)
            copied_s = time.monotonic() - started
        name = f"rank-{self._world.rank:05d}-of-{self._world.size:05d}.safetensors"
        write = _Write(temporary / name, pieces, _held(self._engine))
        self._flight = _Flight(write, final, _About.of(self._engine), state, copied_s)
        if is_copied:
            write.start()
        else:
            write.run()

    def finish(self) -> Saved:
        """Wait until all ranks have written, and commit.

        Raises CheckpointError on every rank if any could not write its part: nothing has changed
        then, earlier checkpoints are intact, and training may go on.
        """
        flight, self._flight = self._flight, None
        assert flight is not None, "no save has begun"
        write, temporary = flight.write, flight.write.path.parent
        try:
            records = together(self._world, write.result)
            written_s = max(self._world.gather_objects(write.seconds))

            def publish() -> None:
                self._fence()
                _finish(temporary, flight.final, flight.about, records, flight.state)

            on_main(self._world, publish)
        except CheckpointError:
            if self._world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        step = commit.step_of(flight.final)
        assert step is not None
        size = sum(record.bytes for _, record, _ in records)
        self._last = Saved(flight.final, step, size, flight.copied_s, written_s)
        return self._last

    def has_saved(self, step: int) -> Path | None:
        """The whole checkpoint of a step, if there is one already."""
        final = commit.step_folder(self._run_dir, step)
        # what was committed last need not be hashed again, but a rewind may have deleted it
        is_known = self._last is not None and self._last.path == final
        is_there = self._world.broadcast_object(
            self._world.is_main and final.is_dir() and (is_known or not commit.find_damage(final))
        )
        return final if is_there else None

    def abandon(self) -> None:
        """Give up a save that is on its way."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        flight.write.wait()
        # nobody's file may appear in the folder after it was removed
        self._world.barrier()
        if self._world.is_main:
            shutil.rmtree(flight.write.path.parent, ignore_errors=True)

    def forsake(self) -> None:
        """Remove what was on its way, alone: for a life that has lost its folder."""
        if self._flight is not None and self._world.is_main:
            shutil.rmtree(self._flight.write.path.parent, ignore_errors=True)


def save_checkpoint(
    engine: Engine, world: World, run_dir: Path, *, step: int, state: dict[str, Any]
) -> Path:
    """Write and commit a checkpoint while all ranks wait; see `Saver.begin` and `finish`.

    A whole checkpoint of this step is left as it is.
    """
    saver = Saver(engine, world, run_dir)
    if existing := saver.has_saved(step):
        log.info("%s exists and is whole", existing)
        return existing
    saver.begin(step, state)
    return saver.finish().path


def write_first_checkpoint(
    run_dir: Path,
    weights: dict[str, Tensor],
    moments: dict[str, dict[str, Tensor]],
    *,
    optimizer_steps: int,
    state: dict[str, Any],
) -> Path:
    """Commit weights that no engine has trained yet as the checkpoint of step 0.

    `moments` are the optimizer's after `optimizer_steps` updates, by section (exp_avg, ...) and
    tensor, or empty. Raises CheckpointError if they are not of these tensors, and OSError.
    """
    sections = {MASTER: weights, **moments}
    infos = _infos(weights)
    for section, tensors in moments.items():
        check_same_tensors(section, _infos(tensors), infos)
    final = commit.step_folder(run_dir, 0)
    temporary = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    commit.make_temporary(temporary)
    pieces = [
        (f"{section}/{name}", tensors[name].detach().float().reshape(-1))
        for name in weights
        for section, tensors in sections.items()
    ]
    name = "rank-00000-of-00001.safetensors"
    held = {tensor.name: (0, tensor.numel) for tensor in infos}
    records = [(name, fragments.write_pieces(temporary / name, pieces), held)]
    about = _About(infos, optimizer_steps, sorted(sections), zero_stage=0)
    _finish(temporary, final, about, records, state)
    return final


def prune_checkpoints(
    run_dir: Path, config: CheckpointConfig, *, saved: Path, first_bad: int | None = None
) -> list[Path]:
    """Delete the checkpoints that are no longer wanted after `saved`; which ones.

    The last one before step `first_bad` stays. For one process: the one that owns the run folder.
    """
    step = commit.step_of(saved)
    assert step is not None, saved
    doomed = commit.prunable(
        commit.committed(run_dir),
        saved=step,
        keep_last=config.keep_last,
        keep_every=config.keep_every_steps,
        tagged=commit.read_tags(run_dir).values(),
        first_bad=first_bad,
    )
    for folder in doomed:
        commit.delete(folder)
        log.info("deleted %s", folder.name)
    return doomed


class _About(NamedTuple):
    """What a manifest says of the model and its optimizer."""

    tensors: list[TensorInfo]
    optimizer_steps: int
    sections: list[str]
    zero_stage: int

    @classmethod
    def of(cls, engine: Engine) -> "_About":
        """As an engine has them now."""
        moments = engine.moments(engine.layout.partitions[0].flat)
        return cls(
            engine.tensors, engine.optimizer_steps, sorted({MASTER, *moments}), engine.zero_stage
        )


class _Write:
    """One rank's file on its way to the disk, in a thread or in the caller's."""

    def __init__(
        self, path: Path, pieces: list[tuple[str, Tensor]], held: dict[str, tuple[int, int]]
    ) -> None:
        self.path = path
        self.seconds = 0.0
        self._pieces, self._held = pieces, held
        self._record: FileRecord | None = None
        self._problem: OSError | None = None
        # a daemon: a process that must end does not wait for a file that nobody will commit
        self._thread: threading.Thread | None = None

    @property
    def is_running(self) -> bool:
        """Whether the thread is at work."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Write in a thread of its own."""
        self._thread = threading.Thread(target=self.run, name="checkpoint", daemon=True)
        self._thread.start()

    def run(self) -> None:
        """Write; what goes wrong is kept for `result`."""
        started = time.monotonic()
        try:
            self._record = fragments.write_pieces(self.path, self._pieces)
        except OSError as error:
            self._problem = error
        self._pieces = []
        self.seconds = time.monotonic() - started

    def wait(self) -> None:
        """Until the file is written or has failed."""
        if self._thread is not None:
            self._thread.join()

    def result(self) -> Written:
        """The file's name and record, and the pieces that it holds. Raises OSError."""
        self.wait()
        if self._problem is not None:
            raise self._problem
        assert self._record is not None, "the thread has died"
        return self.path.name, self._record, self._held


class _Flight(NamedTuple):
    """A save between its beginning and its commit."""

    write: _Write
    final: Path
    about: _About
    state: dict[str, Any]
    copied_s: float


class HostCopies:
    """Copies of a rank's pieces in host memory, in buffers that every save uses again."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._has_warned = False

    def fit(self, world: World, pieces: list[tuple[str, Tensor]]) -> bool:
        """Whether all ranks of each host have memory for their copies; if not, says so once."""
        own = sum(
            fragments.FP32_BYTES * piece.numel()
            for key, piece in pieces
            if key not in self._buffers
        )
        places = world.gather_objects((socket.gethostname(), own))
        needed = sum(size for host, size in places if host == places[world.rank][0])
        available = available_bytes()
        lacks = needed > COPY_SHARE * available
        if not world.any(lacks):
            return True
        if not self._has_warned:
            log.warning(
                "saving makes training wait: copies of %s bytes do not fit into %.0f %% of the %s "
                "bytes available on a host. checkpoint.asynchronous=false says the same without "
                "this warning.",
                f"{needed:,}",
                100 * COPY_SHARE,
                f"{available:,}",
            )
            self._has_warned = True
        return False

    def take(self, pieces: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        """The same pieces as they are now, whatever training does to the originals."""
        copies = []
        for key, piece in pieces:
            buffer = self._buffers.get(key)
            if buffer is None:
                buffer = torch.empty(
                    piece.shape, dtype=piece.dtype, pin_memory=piece.device.type == "cuda"
                )
                self._buffers[key] = buffer
            buffer.copy_(piece.detach(), non_blocking=True)
            copies.append((key, buffer))
        if any(piece.device.type == "cuda" for _, piece in pieces):
            torch.cuda.synchronize()
        return copies


def _own_pieces(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    for partition in engine.layout.partitions:
        sections = {MASTER: partition.flat, **engine.moments(partition.flat)}
        for fragment in partition.fragments:
            name = partition.tensors[fragment.tensor].name
            for section, flat in sections.items():
                yield f"{section}/{name}", partition.piece(fragment, flat)


def _held(engine: Engine) -> dict[str, tuple[int, int]]:
    """First element and number of elements of each tensor's piece on this rank."""
    return {
        partition.tensors[f.tensor].name: (f.tensor_start, f.numel)
        for partition in engine.layout.partitions
        for f in partition.fragments
    }


def _check_space(world: World, run_dir: Path, own_bytes: int) -> None:
    """Raise CheckpointError on all ranks if the disk cannot hold the checkpoint."""
    needed = int(world.sum([float(own_bytes)])[0]) + SPARE_BYTES

    def check() -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(run_dir).free
        if free < needed:
            raise CheckpointError(
                f"{run_dir} has {free:,} bytes free; this checkpoint needs {needed:,}. Free some, "
                "or lower checkpoint.keep_last."
            )

    on_main(world, check)


def _finish(
    temporary: Path,
    final: Path,
    about: _About,
    records: list[Written],
    state: dict[str, Any],
) -> None:
    sizes = {tensor.name: tensor.numel for tensor in about.tensors}
    check_complete([(n, *at) for _, _, held in records for n, at in held.items()], sizes)
    files = {name: record for name, record, _ in records}
    files[commit.STATE] = commit.write_json(temporary / commit.STATE, state)
    manifest = {
        "format": commit.FORMAT,
        "step": commit.step_of(final),
        "optimizer_steps": about.optimizer_steps,
        "sections": about.sections,
        "tensors": {tensor.name: list(tensor.shape) for tensor in about.tensors},
        "files": {name: record._asdict() for name, record in files.items()},
        "pieces": {name: held for name, _, held in records},
        "written_by": {
            "pretrain": __version__,
            "torch": torch.__version__,
            "deepspeed": version("deepspeed"),
            "ranks": len(records),
            "zero_stage": about.zero_stage,
        },
    }
    commit.commit(temporary, final, manifest)


def _infos(tensors: dict[str, Tensor]) -> list[TensorInfo]:
    return [TensorInfo(name, tuple(tensor.shape)) for name, tensor in tensors.items()]
