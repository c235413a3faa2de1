"""Shards are built on file systems that have no file locks, too."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from pretrain.data.build import build, build_share
from pretrain.data.config import Corpus, DataConfig


def sums(shards: Path, **changes: int) -> DataConfig:
    return DataConfig(
        name="sums", corpus=Corpus.addition, max_digits=3, max_bytes=20_000, valid_fraction=0.2,
        shards=str(shards), context=31, build_workers=1, **changes,
    )  # fmt: skip


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_they_are_the_same_and_the_danger_is_said(
    tmp_path: Path, tokenizer_folder: str, monkeypatch, caplog, number: int
) -> None:
    """The answers of Lustre without -o flock and of NFS without its lock service."""
    expected = build(sums(tmp_path / "locked"), tokenizer_folder)

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    folder = tmp_path / "shards"
    for task in range(2):
        build_share(sums(folder, build_tasks=2, build_task=task), tokenizer_folder)
    assert build(sums(folder), tokenizer_folder) == expected
    said = f"{folder} has no file locks ({os.strerror(number)}), so nothing keeps two builds apart"
    assert caplog.text.count(said) == 3
    assert not (folder / ".build").exists()
    # what is there later may be another build's that goes on
    (folder / ".build/0123456789abcdef").mkdir(parents=True)
    assert build(sums(folder), tokenizer_folder) == expected
    assert (folder / ".build/0123456789abcdef").exists()
