"""Parts of a text are tokenized side by side, and given up together."""

import multiprocessing
import os
from pathlib import Path

import pytest

from pretrain.data.config import Corpus, DataConfig
from pretrain.data.parts import PartJob, encode_parts
from pretrain.data.sources import find_parts
from pretrain.errors import DataError


@pytest.fixture
def jobs(tmp_path: Path, tokenizer_folder: str) -> list[PartJob]:
    """Two good parts and a bad one, in this order."""
    (tmp_path / "raw").mkdir()
    for name, text in (("0", b"a cat"), ("1", b"a mat"), ("2", b"\xff")):
        (tmp_path / f"raw/{name}.jsonl").write_bytes(b'{"text": "%b"}\n' % text)
    config = DataConfig(
        name="test", corpus=Corpus.files, root=str(tmp_path / "raw"), shards="unused", context=63
    )
    (parts,) = find_parts(config).values()
    return [
        PartJob(part, config, tokenizer_folder, "uint16", str(tmp_path / str(part.index)))
        for part in parts
    ]


def test_an_error_does_not_wait_for_the_parts_under_way(jobs: list[PartJob]) -> None:
    _, unending, bad = jobs
    path = Path(unending.config.root) / unending.part.path
    path.unlink()
    # who opens it waits for somebody who writes
    os.mkfifo(path)
    before = multiprocessing.active_children()
    # a queue: the first is under way when the second fails
    with pytest.raises(DataError, match=r"2\.jsonl"):
        list(encode_parts([unending, bad], 2))
    assert multiprocessing.active_children() == before


def test_who_takes_no_more_ends_the_workers(jobs: list[PartJob]) -> None:
    before = multiprocessing.active_children()
    encoded = encode_parts(jobs[:2], 2)
    job, record = next(encoded)
    assert record.documents == 1
    assert job in jobs[:2]
    encoded.close()
    assert multiprocessing.active_children() == before
