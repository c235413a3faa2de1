"""Tables of measurements: where they lie, how a row is added, and what it says of card and code."""

import csv
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def check_writable(*paths: Path) -> None:
    """SystemExit if rows cannot be added to these tables: said before there is a row to lose."""
    for path in paths:
        is_new = not path.exists()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
            if is_new:
                path.unlink()
        except OSError as error:
            raise SystemExit(f"{path} cannot be written ({error.strerror}).") from None


def append(path: Path, row: dict[str, Any]) -> None:
    """One row of a CSV file, in the order of its first line; a new file begins with the names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="") as file:
        file.seek(0)
        columns = next(csv.reader(file), None)
        file.seek(0, os.SEEK_END)
        writer = csv.DictWriter(file, columns or list(row))
        if columns is None:
            writer.writeheader()
        writer.writerow(row)


def card() -> str:
    """The name of the GPU, or cpu."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def commit() -> str:
    """Of this code, `-dirty` if more of the checkout differs from it than these tables.

    PRETRAIN_COMMIT names it where a copy without its history is measured; unknown without either.
    """
    if named := os.environ.get("PRETRAIN_COMMIT"):
        return named
    git = ("git", "-C", str(RESULTS))
    head = said(*git, "rev-parse", "--short", "HEAD")
    changed = said(*git, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":!.")
    return (head or "unknown") + "-dirty" * bool(changed)


def said(*command: str) -> str:
    """The first line of a command's output; empty where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip().split("\n")[0]
