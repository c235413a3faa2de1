"""Small shards of known content, written by the real writer."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.data.config import Corpus, DataConfig, SourceConfig, TokenizerConfig
from pretrain.data.manifest import Manifest, SourceManifest, TokenizerManifest
from pretrain.data.parts import PartFiles, PartRecord, commit
from pretrain.data.special_ids import special_ids
from pretrain.data.tokenizer import MAIN_FILES, SENTENCEPIECE, describe, write_folder
from pretrain.data.tokenizer_sentencepiece import SentencePieceTokenizer
from pretrain.data.tokenizer_training import train
from pretrain.data.write import Packing, write_split

# beyond 16 bits, so that every token of a test can be another one
VOCABULARY_SIZE = 200_000


def write_part(stem: Path, lengths: list[int], *, first_id: int, held_out: set[int]) -> PartFiles:
    """A tokenized part: documents of these lengths whose tokens count up from first_id."""
    special = special_ids(VOCABULARY_SIZE)
    documents = []
    for length in lengths:
        body = list(range(first_id, first_id + length - 2))
        first_id += length - 2
        documents.append([special.begin_text, *body, special.end_text])
    files = PartFiles(stem, "uint32")
    stem.parent.mkdir(parents=True, exist_ok=True)
    tokens = np.array([token for ids in documents for token in ids], dtype=np.uint32)
    files.tokens.write_bytes(tokens.tobytes())
    table = [(length, i in held_out) for i, length in enumerate(lengths)]
    np.save(files.documents, np.array(table, dtype=np.int64).reshape(-1, 2))
    record = PartRecord(
        tokens=len(tokens), documents=len(lengths), text_bytes=0, corpus_sha256="0" * 64
    )
    commit(files.record, record.to_bytes())
    return files


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer of 512 pieces, trained on this folder's tests."""
    folder = tmp_path_factory.mktemp("tokenizer")
    config = TokenizerConfig(
        path=str(folder / "512"), vocabulary_size=512, train_bytes=100_000, threads=1
    )
    data = DataConfig(
        name="tests",
        corpus=Corpus.files,
        root=str(folder / "raw"),
        shards="unused",
        context=8,
        sources={"tests": SourceConfig(paths=["*.txt"])},
    )
    (folder / "raw").mkdir()
    for path in Path(__file__).parent.glob("test_*.py"):
        (folder / "raw" / f"{path.stem}.txt").write_text(path.read_text())
    model, _ = train(config, data)
    info = describe(SentencePieceTokenizer(model), SENTENCEPIECE) | {"settings": {}}
    write_folder(config.path, {MAIN_FILES[SENTENCEPIECE]: model}, info)
    return config.path


@pytest.fixture
def write_parts() -> Callable[..., list[PartFiles]]:
    """Writes parts with documents of the given lengths, every n-th of which is held out."""

    def write(folder: Path, parts: list[list[int]], *, held_out_every: int) -> list[PartFiles]:
        first_id, written = 0, []
        for number, lengths in enumerate(parts):
            held_out = set(range(0, len(lengths), held_out_every))
            stem = folder / str(number)
            written.append(write_part(stem, lengths, first_id=first_id, held_out=held_out))
            first_id += sum(lengths)
        return written

    return write


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., DataConfig]:
    """Writes shards of random documents below tmp_path; returns the configuration that reads them.

    `sources` has the number of documents and the weight of each.
    """

    def make(sources: dict[str, tuple[int, float | None]], **settings: Any) -> DataConfig:
        config = small_config(tmp_path, sources, **settings)
        random = np.random.default_rng(len(sources))
        manifests, first_id = [], 0
        for name, (num_documents, weight) in sources.items():
            lengths = random.integers(3, 80, size=num_documents).tolist()
            part = write_part(
                tmp_path / "parts" / name,
                lengths,
                first_id=first_id,
                held_out=set(range(0, num_documents, 5)),
            )
            first_id += sum(lengths)
            manifests.append(write_source(config, name, weight, part))
        assert first_id < special_ids(VOCABULARY_SIZE).begin_text
        write_manifest(config, manifests)
        return config

    return make


def small_config(
    folder: Path, sources: dict[str, tuple[int, float | None]], **settings: Any
) -> DataConfig:
    values: dict[str, Any] = {
        "name": "test",
        "corpus": Corpus.files,
        "root": "unused",
        "shards": str(folder / "shards"),
        "context": 31,
        "rows_per_member": 4,
        "members_per_shard": 3,
        "pack_tokens": 2_000,
        "loader_workers": 0,
        "window_shards": 2,
        "cache": str(folder / "cache"),
        "sources": {name: SourceConfig(weight=weight) for name, (_, weight) in sources.items()},
    }
    return DataConfig(**(values | settings))


def write_source(
    config: DataConfig, name: str, weight: float | None, part: PartFiles
) -> SourceManifest:
    packing = Packing(
        row_tokens=config.context + 1,
        pad=special_ids(VOCABULARY_SIZE).pad,
        pack_tokens=config.pack_tokens,
        rows_per_member=config.rows_per_member,
        members_per_shard=config.members_per_shard,
    )
    folder = Path(config.shards)
    splits = {
        split: list(write_split([part], packing, split=split, source=name, folder=folder))
        for split in ("train", "valid")
    }
    return SourceManifest(
        name=name, licence="", provenance="", weight=weight, corpus_sha256="0" * 64, **splits
    )


def write_manifest(config: DataConfig, sources: list[SourceManifest]) -> None:
    manifest = Manifest(
        tool="test",
        context=config.context,
        dtype="uint32",
        rows_per_member=config.rows_per_member,
        tokenizer=TokenizerManifest(
            sha256=hashlib.sha256(b"test").hexdigest(),
            vocabulary_size=VOCABULARY_SIZE,
            special=special_ids(VOCABULARY_SIZE)._asdict(),
        ),
        settings={},
        sources=sources,
    )
    commit(Path(config.shards) / "manifest.json", manifest.to_bytes())
