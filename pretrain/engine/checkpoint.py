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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.engine import commit
from pretrain.engine.agreement import together
from pretrain.engine.deepspeed import Engine
from pretrain.engine.fragments import MASTER, PieceReader, Stored
from pretrain.engine.partitions import check_same_tensors
from pretrain.engine.world import World
from pretrain.errors import CheckpointError
from pretrain.optim.slices import TensorInfo

log = logging.getLogger(__name__)


def newest_checkpoint(
    run_dir: Path, world: World | None = None, *, up_to: int | None = None
) -> Path | None:
    """The newest whole checkpoint of a run, of step `up_to` at most; None if there is none at all.

    Every file is hashed; with `world`, the ranks share the work and all call this together. A
    damaged checkpoint is skipped with a warning. Raises CheckpointError if all are damaged.
    """
    folders = commit.committed(run_dir)
    if world is not None:
        folders = world.broadcast_object(folders)
    damages = []
    for folder in folders:
        if up_to is not None and (commit.step_of(folder) or 0) > up_to:
            continue
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


def set_later_aside(run_dir: Path, newest: Path) -> None:
    """Move the checkpoints after the newest whole one, which are damaged, out of the way.

    For one process: the one that owns the run folder. `latest` names `newest` afterwards.
    """
    later = commit.committed(run_dir)
    later = later[: later.index(newest)]
    for folder in later:
        aside = commit.set_aside(folder)
        log.error(
            "%s is damaged: it is now %s, and the run goes on from %s. Look for the cause; remove "
            "the folder when it is no longer needed.",
            folder,
            aside,
            newest.name,
        )
    if later:
        commit.point_to(newest)


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
    check_same_tensors(str(folder), _tensors(manifest), engine.tensors)
    together(world, lambda: _read_own(engine, folder, manifest))
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


def _find_damage(folder: Path, world: World | None) -> str:
    if world is None:
        return commit.find_damage(folder)
    own = commit.find_damage(folder, share=world.rank, shares=world.size)
    return next((damage for damage in world.gather_objects(own) if damage), "")


def _read_own(engine: Engine, folder: Path, manifest: dict[str, Any]) -> None:
    sections = [section for section in manifest["sections"] if section != MASTER]
    with PieceReader(folder, _stored(manifest)) as reader, torch.no_grad():
        for partition in engine.layout.partitions:
            # into the memory that is there: DeepSpeed has views of it, so it would never be freed
            known = engine.moments(partition.flat)
            moments = {
                section: known[section] if section in known else torch.zeros_like(partition.flat)
                for section in sections
            }
            for fragment in partition.fragments:
                name = partition.tensors[fragment.tensor].name
                for section, flat in {MASTER: partition.flat, **moments}.items():
                    piece = partition.piece(fragment, flat).detach()
                    reader.read(section, name, fragment.tensor_start, piece)
            engine.set_moments(partition.flat, moments, steps=manifest["optimizer_steps"])


def _tensors(manifest: dict[str, Any]) -> list[TensorInfo]:
    return [TensorInfo(name, tuple(shape)) for name, shape in manifest["tensors"].items()]


def _stored(manifest: dict[str, Any]) -> dict[str, list[Stored]]:
    stored: dict[str, list[Stored]] = {name: [] for name in manifest["tensors"]}
    for file, held in manifest["pieces"].items():
        for name, (start, numel) in held.items():
            stored[name].append(Stored(start, numel, file))
    return stored
