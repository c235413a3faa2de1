"""Checkpoints that know no topology: fp32 weights and moments by tensor name.

A checkpoint is a folder `<run.dir>/checkpoints/step-N` of
- `rank-R-of-S.safetensors`: the contiguous pieces of each tensor that rank R held, flattened, under
  `master/<name>`, `exp_avg/<name>` and `exp_avg_sq/<name>`;
- `state.json`: what the loop handed over;
- `manifest.json`: sizes and hashes of all files, the tensors' shapes, and which file holds which
  piece of which tensor.

Any number of ranks under any ZeRO stage reads it, because each reads the slices that it needs.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from pretrain import __version__
from pretrain.engine import commit, fragments
from pretrain.engine.config import CheckpointConfig
from pretrain.engine.deepspeed import Engine
from pretrain.engine.fragments import FileRecord, PieceReader, Stored
from pretrain.engine.partitions import check_complete
from pretrain.engine.world import World
from pretrain.errors import CheckpointError
from pretrain.optim.slices import TensorInfo

log = logging.getLogger(__name__)

MASTER = "master"
T = TypeVar("T")
# Manifest, state, and what a filesystem needs to name the files.
SPARE_BYTES = 4 << 20


def save_checkpoint(
    engine: Engine, world: World, run_dir: Path, *, step: int, state: dict[str, Any]
) -> Path:
    """Write and commit the checkpoint after `step` steps; all ranks call it together.

    `state` (rank 0's counts) must be JSON. If a whole checkpoint of this step exists it is left as
    it is. Raises CheckpointError on every rank if any rank could not write its part: nothing has
    changed then, earlier checkpoints are intact, and training may go on.
    """
    final = commit.step_folder(run_dir, step)
    token, is_there = world.broadcast_object(
        (os.urandom(4).hex(), final.is_dir() and not commit.find_damage(final))
        if world.is_main
        else None
    )
    if is_there:
        log.info("%s exists and is whole", final)
        return final
    temporary = final.with_name(f"{final.name}.tmp-{token}")
    pieces = list(_own_pieces(engine))
    _check_space(world, run_dir, fragments.size_of(pieces))
    try:
        _on_main(world, lambda: commit.make_temporary(temporary))
        records = _together(world, lambda: _write_own(temporary, world, engine, pieces))
        about = _About(
            engine.tensors,
            engine.optimizer_steps,
            sorted({MASTER, *engine.moments(engine.layout.partitions[0].flat)}),
            engine.zero_stage,
        )
        _on_main(world, lambda: _finish(temporary, final, about, records, state))
    except CheckpointError:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


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
    for section, tensors in moments.items():
        _check_same_tensors(Path(section), _infos(tensors), _infos(weights))
    final = commit.step_folder(run_dir, 0)
    temporary = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    commit.make_temporary(temporary)
    pieces = [
        (f"{section}/{name}", tensors[name].detach().float().reshape(-1))
        for name in weights
        for section, tensors in sections.items()
    ]
    name = "rank-00000-of-00001.safetensors"
    held = {tensor.name: (0, tensor.numel) for tensor in _infos(weights)}
    records = [(name, fragments.write_pieces(temporary / name, pieces), held)]
    about = _About(_infos(weights), optimizer_steps, sorted(sections), zero_stage=0)
    _finish(temporary, final, about, records, state)
    return final


def newest_checkpoint(run_dir: Path, world: World | None = None) -> Path | None:
    """The newest whole checkpoint of a run; None only if there is none at all.

    Every file is hashed; with `world`, the ranks share the work and all call this together. A
    damaged checkpoint is skipped with a warning. Raises CheckpointError if all are damaged.
    """
    folders = commit.committed(run_dir)
    if world is not None:
        folders = world.broadcast_object(folders)
    damages = []
    for folder in folders:
        damage = _find_damage(folder, world)
        if not damage:
            return folder
        log.warning("%s is damaged and skipped: %s", folder, damage)
        damages.append(f"{folder.name}: {damage}")
    if damages:
        raise CheckpointError(
            f"{commit.checkpoints_folder(run_dir)} has no whole checkpoint:\n  "
            + "\n  ".join(damages)
            + "\n  Restore one, or move the folder away to start from the beginning."
        )
    return None


def whole_checkpoint(run_dir: Path, step: int) -> Path:
    """The checkpoint of a step. Raises CheckpointError if there is none, or it is damaged."""
    folder = commit.step_folder(run_dir, step)
    if not folder.is_dir():
        there = ", ".join(str(commit.step_of(other)) for other in commit.committed(run_dir))
        raise CheckpointError(
            f"{run_dir} has no checkpoint of step {step}; it has {there or 'none'}."
        )
    if damage := commit.find_damage(folder):
        raise CheckpointError(f"{folder} is damaged: {damage}. Choose another step.")
    return folder


def load_checkpoint(engine: Engine, world: World, folder: Path) -> dict[str, Any]:
    """Give the engine the weights, moments and step count of a checkpoint; its `state`.

    All ranks call it together. Raises CheckpointError, naming the differences, if the checkpoint
    is of another model, and if it cannot be read.
    """
    manifest = commit.read_manifest(folder)
    _check_same_tensors(folder, _tensors(manifest), engine.tensors)
    _together(world, lambda: _read_own(engine, folder, manifest))
    engine.optimizer_steps = manifest["optimizer_steps"]
    engine.refresh()
    return read_state(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """What the loop handed over when it saved. Raises CheckpointError if it cannot be read."""
    return commit.read_json(folder / commit.STATE)


def load_weights(folder: Path, section: str = MASTER) -> dict[str, Tensor]:
    """All fp32 weights of a checkpoint by name, whole, in one process; or a kind of moments.

    Raises CheckpointError if the checkpoint has no such section.
    """
    manifest = commit.read_manifest(folder)
    if section not in manifest["sections"]:
        raise CheckpointError(
            f"{folder} holds no {section}; it holds {', '.join(manifest['sections'])}."
        )
    weights = {}
    with PieceReader(folder, _stored(manifest)) as reader:
        for tensor in _tensors(manifest):
            flat = torch.empty(tensor.numel, dtype=torch.float32)
            reader.read(section, tensor.name, 0, flat)
            weights[tensor.name] = flat.view(tensor.shape)
    return weights


def read_optimizer_steps(folder: Path) -> int:
    """How many updates the moments of a checkpoint have seen."""
    return int(commit.read_manifest(folder)["optimizer_steps"])


def prune_checkpoints(run_dir: Path, config: CheckpointConfig, *, saved: Path) -> list[Path]:
    """Delete the checkpoints that are no longer wanted after `saved`; which ones.

    For one process: the one that owns the run folder.
    """
    step = commit.step_of(saved)
    assert step is not None, saved
    doomed = commit.prunable(
        commit.committed(run_dir),
        saved=step,
        keep_last=config.keep_last,
        keep_every=config.keep_every_steps,
    )
    for folder in doomed:
        commit.delete(folder)
        log.info("deleted %s", folder.name)
    return doomed


def _together(world: World, action: Callable[[], T]) -> list[T]:
    """Every rank acts; either all have succeeded or all raise CheckpointError."""
    try:
        mine: tuple[T | None, str] = (action(), "")
    except (OSError, CheckpointError) as error:
        mine = (None, f"rank {world.rank}: {error}")
    results = world.gather_objects(mine)
    if errors := [error for _, error in results if error]:
        raise CheckpointError(
            "\n  ".join([f"{len(errors)} of {world.size} ranks failed:", *errors])
        )
    return [result for result, _ in results]


def _on_main(world: World, action: Callable[[], None]) -> None:
    """Rank 0 acts; either it has succeeded or all ranks raise CheckpointError."""
    _together(world, action if world.is_main else lambda: None)


def _own_pieces(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    for partition in engine.layout.partitions:
        sections = {MASTER: partition.flat, **engine.moments(partition.flat)}
        for fragment in partition.fragments:
            name = partition.tensors[fragment.tensor].name
            for section, flat in sections.items():
                yield f"{section}/{name}", partition.piece(fragment, flat)


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

    _on_main(world, check)


def _write_own(
    temporary: Path, world: World, engine: Engine, pieces: list[tuple[str, Tensor]]
) -> tuple[str, FileRecord, dict[str, tuple[int, int]]]:
    name = f"rank-{world.rank:05d}-of-{world.size:05d}.safetensors"
    held = {
        partition.tensors[f.tensor].name: (f.tensor_start, f.numel)
        for partition in engine.layout.partitions
        for f in partition.fragments
    }
    return name, fragments.write_pieces(temporary / name, pieces), held


class _About(NamedTuple):
    """What a manifest says of the model and its optimizer."""

    tensors: list[TensorInfo]
    optimizer_steps: int
    sections: list[str]
    zero_stage: int


def _finish(
    temporary: Path,
    final: Path,
    about: _About,
    records: list[tuple[str, FileRecord, dict[str, tuple[int, int]]]],
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


def _find_damage(folder: Path, world: World | None) -> str:
    if world is None:
        return commit.find_damage(folder)
    own = commit.find_damage(folder, share=world.rank, shares=world.size)
    return next((damage for damage in world.gather_objects(own) if damage), "")


def _read_own(engine: Engine, folder: Path, manifest: dict[str, Any]) -> None:
    sections = [section for section in manifest["sections"] if section != MASTER]
    with PieceReader(folder, _stored(manifest)) as reader, torch.no_grad():
        for partition in engine.layout.partitions:
            moments = {section: torch.zeros_like(partition.flat) for section in sections}
            for fragment in partition.fragments:
                name = partition.tensors[fragment.tensor].name
                for section, flat in {MASTER: partition.flat, **moments}.items():
                    piece = partition.piece(fragment, flat).detach()
                    reader.read(section, name, fragment.tensor_start, piece)
            engine.set_moments(partition.flat, moments, steps=manifest["optimizer_steps"])


def _tensors(manifest: dict[str, Any]) -> list[TensorInfo]:
    return [TensorInfo(name, tuple(shape)) for name, shape in manifest["tensors"].items()]


def _infos(tensors: dict[str, Tensor]) -> list[TensorInfo]:
    return [TensorInfo(name, tuple(tensor.shape)) for name, tensor in tensors.items()]


def _stored(manifest: dict[str, Any]) -> dict[str, list[Stored]]:
    stored: dict[str, list[Stored]] = {name: [] for name in manifest["tensors"]}
    for file, held in manifest["pieces"].items():
        for name, (start, numel) in held.items():
            stored[name].append(Stored(start, numel, file))
    return stored


def _check_same_tensors(
    folder: Path, stored: list[TensorInfo], wanted: list[TensorInfo], shown: int = 3
) -> None:
    saved, ours = (
        {tensor.name: tensor.shape for tensor in tensors} for tensors in (stored, wanted)
    )
    differences = [
        f"{name}: {saved.get(name, 'absent')} in the checkpoint, {ours.get(name, 'absent')} here"
        for name in sorted(saved.keys() | ours.keys())
        if saved.get(name) != ours.get(name)
    ]
    if differences:
        more = len(differences) - shown
        raise CheckpointError(
            f"{folder} is of another model: {len(differences)} tensors differ.\n  "
            + "\n  ".join(differences[:shown] + ([f"and {more} more"] if more > 0 else []))
            + "\n  Use the run's own model preset, or another run.dir."
        )
