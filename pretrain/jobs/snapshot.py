"""A copy of the code that a job runs, so that later edits of the checkout do not reach it.

`<folder>/<first 12 digits of the tree's hash>/` has the files that git tracks, with their changes
in the checkout, and untracked ones that it does not ignore; snapshot.json beside them says where
they are from. Equal code is stored once.
"""

import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain.errors import ConfigError

# What a job needs. Text, runs and tests stay behind.
SHIPPED = ("conf", "constraints.txt", "kernels", "launch", "pretrain", "pyproject.toml", "slurm")
# Where jobs write below that: no part of the code, and never still.
_WRITTEN = "slurm/logs"
_RECORD = "snapshot.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """One copy of the code, and where it comes from."""

    folder: Path
    """The copy; it looks like a checkout."""
    commit: str
    """What HEAD was, or nothing outside git."""
    diff_sha256: str
    """Hash of the differences from that commit, or nothing if there were none."""
    tree_sha256: str
    """Hash of every path, mode and content."""

    def __str__(self) -> str:
        changes = f" with changes {self.diff_sha256[:12]}" if self.diff_sha256 else ""
        return f"commit {self.commit[:12] or 'unknown'}{changes}, tree {self.tree_sha256[:12]}"


def checkout() -> Path:
    """The checkout that this package is in. Raises ConfigError if it is installed without one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "launch/node.sh").is_file() or not (root / "conf").is_dir():
        raise ConfigError(
            f"pretrain is installed in {root} without launch/ and conf/; submit from a checkout."
        )
    return root


def describe(root: Path, into: Path) -> Snapshot:
    """The snapshot that `take` would make of the checkout `root` below `into`."""
    return _describe(root, into, _shipped_files(root))


def code_origin() -> dict[str, str]:
    """Commit and hash of the changes of the code that runs; empty where nobody knows."""
    try:
        root = checkout()
        if (root / _RECORD).is_file():
            found = json.loads((root / _RECORD).read_text(encoding="utf-8"))
            return {"commit": found["commit"], "diff_sha256": found["diff_sha256"]}
        snapshot = describe(root, root)
    except (ConfigError, OSError, ValueError, KeyError):
        return {}
    return {"commit": snapshot.commit, "diff_sha256": snapshot.diff_sha256}


def take(root: Path, into: Path) -> Snapshot:
    """Copy the code of the checkout `root` below `into`, whole or not at all.

    Raises ConfigError if an earlier copy of the same code is there and was edited.
    """
    files = _shipped_files(root)
    snapshot = _describe(root, into, files)
    target = snapshot.folder
    if target.is_dir():
        recorded = json.loads((target / _RECORD).read_text(encoding="utf-8"))
        if _tree_hash(target, recorded["files"]) != snapshot.tree_sha256:
            raise ConfigError(
                f"{target} was edited, and jobs may be running from it. Move it away and submit "
                "again: edits belong in the checkout."
            )
        return snapshot
    temporary = into / f".{target.name}.{os.getpid()}.partial"
    try:
        for name in files:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, temporary / name)
        record = asdict(snapshot) | {"folder": str(target), "checkout": str(root), "files": files}
        (temporary / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if _tree_hash(temporary, files) != snapshot.tree_sha256:
            raise ConfigError(f"{root} was edited while it was copied; submit again.")
        temporary.rename(target)
    except OSError as error:
        if not target.is_dir():
            raise ConfigError(f"{target} cannot be written: {error}.") from error
        # somebody has stored the same code at the same moment
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return snapshot


def _describe(root: Path, into: Path, files: list[str]) -> Snapshot:
    tree = _tree_hash(root, files)
    commit = _git(root, "rev-parse", "--verify", "HEAD").decode().strip()
    changes = _git(root, "diff", "HEAD", "--binary", "--", *SHIPPED) if commit else b""
    added = _git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *SHIPPED)
    for name in sorted(filter(None, os.fsdecode(added).split("\0"))):
        changes += os.fsencode(name) + b"\0" + (root / name).read_bytes()
    return Snapshot(
        folder=into / tree[:12],
        commit=commit,
        diff_sha256=hashlib.sha256(changes).hexdigest() if changes else "",
        tree_sha256=tree,
    )


def _shipped_files(root: Path) -> list[str]:
    """Paths below `root`: what git tracks and has not been deleted, and what is new there."""
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--",
                  *SHIPPED)  # fmt: skip
    names = {name for name in os.fsdecode(listed).split("\0") if name and (root / name).is_file()}
    if not names:
        # an unpacked archive
        found = (path for top in SHIPPED for path in [root / top, *(root / top).rglob("*")])
        names = {
            str(path.relative_to(root))
            for path in found
            if path.is_file()
            and "__pycache__" not in path.parts
            and not path.is_relative_to(root / _WRITTEN)
        }
    return sorted(names)


def _tree_hash(root: Path, files: list[str]) -> str:
    total = hashlib.sha256()
    for name in files:
        path = root / name
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"
        is_program = os.access(path, os.X_OK)
        total.update(f"{content} {'x' if is_program else '-'} {name}\0".encode(errors="replace"))
    return total.hexdigest()


def _git(root: Path, *arguments: str) -> bytes:
    """Output of git there; empty without git, or outside a repository."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True)
    except OSError:
        return b""
    return done.stdout if done.returncode == 0 else b""
