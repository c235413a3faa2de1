"""How a folder of files becomes a checkpoint: whole or not at all.

All ranks write into `step-N.tmp-<token>`; once every byte is on the disk and hashed in a manifest,
one rename makes it `step-N`. A process that dies before the rename leaves a temporary folder that
nobody reads and the next life sweeps away; one that dies after it leaves a whole checkpoint.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pretrain.engine.fragments import FileRecord
from pretrain.errors import CheckpointError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"
LATEST = "latest"
TAGS = "tags"
DAMAGED = "damaged"
FORMAT = 1
HASH_CHUNK_BYTES = 1 << 22
_STEP = re.compile(r"step-(\d{10,})")


def checkpoints_folder(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def step_folder(run_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimizer steps."""
    return checkpoints_folder(run_dir) / f"step-{step:010d}"


def step_of(folder: Path) -> int | None:
    """The step of a committed checkpoint's folder; None for any other name."""
    match = _STEP.fullmatch(folder.name)
    return int(match.group(1)) if match else None


def committed(run_dir: Path) -> list[Path]:
    """Folders of committed checkpoints, newest first. They may have been damaged since."""
    try:
        folders = list(checkpoints_folder(run_dir).iterdir())
    except FileNotFoundError:
        return []
    return sorted(
        (f for f in folders if step_of(f) is not None), key=lambda f: step_of(f) or 0, reverse=True
    )


def make_temporary(folder: Path) -> None:
    """Create the folder that ranks write into."""
    folder.mkdir(parents=True)


def write_json(path: Path, value: Any) -> FileRecord:
    """Write JSON and see it onto the disk. Raises OSError."""
    data = (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, with its own hash: the last file of a checkpoint."""
    write_json(folder / MANIFEST, manifest | {"sha256": _hash_json(manifest)})


def sync_folder(folder: Path) -> None:
    """See a folder's entries onto the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, final: Path) -> None:
    """Make a complete temporary folder the checkpoint. A damaged one of that name makes way."""
    if final.exists():
        delete(final)
    os.rename(temporary, final)


def write_pointer(folder: Path, temporary: Path) -> None:
    """Write the new content of `latest` beside it."""
    with temporary.open("w") as file:
        file.write(folder.name + "\n")
        file.flush()
        os.fsync(file.fileno())


def replace_pointer(temporary: Path) -> None:
    """Make the new content of `latest` the content."""
    os.replace(temporary, temporary.parent / LATEST)


def commit(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Turn a folder into which all ranks have written into the newest checkpoint.

    Raises OSError. Every function called here is a point at which a process may die.
    """
    write_manifest(temporary, manifest)
    sync_folder(temporary)
    publish(temporary, final)
    sync_folder(final.parent)
    point_to(final)


def delete(folder: Path) -> None:
    """Remove a checkpoint so that it is never seen half removed."""
    doomed = folder.with_name(f"{folder.name}.deleting-{os.urandom(4).hex()}")
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep_temporaries(run_dir: Path) -> list[str]:
    """Remove what dead processes left behind; names of what was removed.

    Only for the process that owns the run folder: another one may be writing.
    """
    removed = []
    folder = checkpoints_folder(run_dir)
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if ".tmp-" in path.name or ".deleting-" in path.name:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            removed.append(path.name)
            log.warning("removed %s, left by a process that died", path.name)
    return removed


def prunable(
    folders: Sequence[Path],
    *,
    saved: int,
    keep_last: int,
    keep_every: int,
    tagged: Collection[int] = (),
    first_bad: int | None = None,
) -> list[Path]:
    """Which checkpoints are no longer wanted after step `saved` was saved.

    Never the one just saved, nor later ones: those were found damaged, or it would not have
    been saved after them, so they do not count among the last. Nor steps that a tag names, nor
    the last one before `first_bad`, where a run may have to go back to.
    """
    older = [f for f in folders if (step_of(f) or 0) <= saved]
    older.sort(key=lambda f: step_of(f) or 0, reverse=True)
    good = [step_of(f) for f in older if first_bad is not None and (step_of(f) or 0) < first_bad]
    wanted = {*tagged, *good[:1]}
    return [
        f
        for f in older[keep_last:]
        if not (keep_every and (step_of(f) or 0) % keep_every == 0) and step_of(f) not in wanted
    ]


def read_tags(run_dir: Path) -> dict[str, int]:
    """Steps by the tags that keep their checkpoints: files `checkpoints/tags/NAME`."""
    tags = {}
    folder = checkpoints_folder(run_dir) / TAGS
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        step = step_of(Path(path.read_text(encoding="utf-8", errors="replace").strip()))
        if step is None:
            log.warning("%s names no checkpoint such as %s", path, step_folder(run_dir, 0).name)
        else:
            tags[path.name] = step
    return tags


def write_tag(run_dir: Path, tag: str, step: int) -> None:
    """Keep the checkpoint of a step until the tag is removed, or given to another step."""
    folder = checkpoints_folder(run_dir) / TAGS
    folder.mkdir(parents=True, exist_ok=True)
    temporary = checkpoints_folder(run_dir) / f"{tag}.tmp-{os.getpid()}"
    temporary.write_text(step_folder(run_dir, step).name + "\n", encoding="utf-8")
    os.replace(temporary, folder / tag)


def set_aside(folder: Path) -> Path:
    """Move a damaged checkpoint to checkpoints/damaged, where nothing reads or removes it."""
    aside = folder.parent / DAMAGED / f"{folder.name}-{os.urandom(4).hex()}"
    aside.parent.mkdir(exist_ok=True)
    os.rename(folder, aside)
    return aside


def point_to(folder: Path) -> None:
    """Make `latest` name a checkpoint."""
    pointer = folder.parent / f"{LATEST}.tmp-{os.urandom(4).hex()}"
    write_pointer(folder, pointer)
    replace_pointer(pointer)
    sync_folder(folder.parent)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError if it is missing or damaged."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error!r}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object.")
    return value


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises CheckpointError if it is missing or damaged."""
    manifest = read_json(folder / MANIFEST)
    if (found := manifest.get("format")) != FORMAT:
        raise CheckpointError(
            f"{folder / MANIFEST} has format {found}; this program reads format {FORMAT}."
        )
    stated = manifest.pop("sha256", None)
    if stated != (own := _hash_json(manifest)):
        raise CheckpointError(f"{folder / MANIFEST} states sha256 {stated} but has {own}.")
    return manifest


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def find_damage(folder: Path, *, share: int = 0, shares: int = 1) -> str:
    """What is wrong with a checkpoint, or "" if its files are whole.

    Sizes and sha256 of every file; of every `shares`-th file from `share` on, if the work is split.
    """
    try:
        files = sorted(read_manifest(folder)["files"].items())
        for name, record in files[share::shares]:
            path = folder / name
            size = path.stat().st_size
            if size != record["bytes"]:
                return f"{name} has {size} bytes instead of {record['bytes']}"
            if (found := hash_file(path)) != record["sha256"]:
                return f"{name} has sha256 {found} instead of {record['sha256']}"
    except CheckpointError as error:
        return str(error)
    except (OSError, KeyError, TypeError, AttributeError) as error:
        return repr(error)
    return ""


def hash_file(path: Path) -> str:
    """The sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
