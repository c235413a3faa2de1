"""The tokenizer: exact round trips, fixed special ids, training that says what is wrong."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pretrain.config import TrainConfig
from pretrain.data import tokenizer_sentencepiece, tokenizer_training
from pretrain.data.config import Corpus, DataConfig, SourceConfig, TokenizerConfig
from pretrain.data.special_ids import SpecialIds, special_ids, special_names
from pretrain.data.tokenizer import (
    SENTENCEPIECE,
    Tokenizer,
    describe,
    main,
    read_info,
    write_folder,
)
from pretrain.data.tokenizer_sentencepiece import SentencePieceTokenizer
from pretrain.data.tokenizer_training import Sample, source_shares, train, training_settings
from pretrain.errors import ConfigError, DataError

WORDS = "the quick brown fox jumps over a lazy dog while 12 + 34 = 46;\n    return value\n\n"


def command_config(folder: Path, **tokenizer: object) -> TrainConfig:
    """What the command reads of a run's configuration, on a corpus of one file."""
    (folder / "raw").mkdir(exist_ok=True)
    text = "".join(f"{WORDS}{word}{i} {word[::-1]}\n" for i, word in enumerate(WORDS.split() * 20))
    (folder / "raw/a.txt").write_text(text)
    values: dict[str, object] = {"path": str(folder / "tokenizer"), "vocabulary_size": 400}
    data = DataConfig(
        name="mine", corpus=Corpus.files, root=str(folder / "raw"), shards="unused", context=8
    )
    config = TokenizerConfig(**(values | tokenizer))  # type: ignore[arg-type]
    return cast(TrainConfig, SimpleNamespace(tokenizer=config, data=data))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: str) -> SentencePieceTokenizer:
    return cast(SentencePieceTokenizer, Tokenizer.load(tokenizer_folder))


any_text = st.text(st.characters(codec="utf-8")) | st.text(" \u2581\n\t\r\0a1<|>_")


@given(any_text)
@example("")
@example(" a\u2581b \u2581\u2581 ")
@example("\0\r\n\ufeff\ufffd\u2028")
@example("<s></s><unk><0x41>\u2585\u2047")
@example("naïve 日本語 \U0001f916\u200d A\u030a ﬁ")
@settings(max_examples=500, deadline=None)
def test_any_text_comes_back_exactly(tokenizer: SentencePieceTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert all(0 < token < tokenizer.special.begin_text for token in ids)


@given(st.lists(any_text, max_size=5), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_a_batch_is_encoded_like_its_texts(
    tokenizer: SentencePieceTokenizer, texts: list[str], chunk: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_sentencepiece, "CHUNK_CHARACTERS", chunk)
        one_by_one = [tokenizer.encode(text) for text in texts]
        assert tokenizer.encode_batch(texts, threads=2) == one_by_one
        assert [tokenizer.decode(ids) for ids in one_by_one] == texts


def test_long_texts_are_cut_after_line_breaks(tokenizer: SentencePieceTokenizer) -> None:
    lines = [f"line {i} of a long text\n" for i in range(5000)]
    text = "".join(lines)
    head = text[: text.rindex("\n", 0, tokenizer_sentencepiece.CHUNK_CHARACTERS) + 1]
    middle = text[len(head) :]
    middle = middle[: middle.rindex("\n", 0, tokenizer_sentencepiece.CHUNK_CHARACTERS) + 1]
    tail = text[len(head) + len(middle) :]
    assert 0 < len(tail) < tokenizer_sentencepiece.CHUNK_CHARACTERS
    ids = tokenizer.encode(text)
    assert ids == [t for part in (head, middle, tail) for t in tokenizer.encode(part)]
    assert tokenizer.decode(ids) == text
    unbroken = "x" * (2 * tokenizer_sentencepiece.CHUNK_CHARACTERS + 1)
    assert tokenizer.decode(tokenizer.encode(unbroken)) == unbroken


def test_text_that_spells_special_tokens_stays_text(tokenizer: SentencePieceTokenizer) -> None:
    for name in special_names():
        ids = tokenizer.encode(f"a{name}b")
        assert max(ids) < tokenizer.special.begin_text
        assert tokenizer.decode(ids) == f"a{name}b"


def test_digits_stand_alone(tokenizer: SentencePieceTokenizer) -> None:
    digits = [tokenizer.token_bytes(i) for i in tokenizer.encode("120712")]
    assert digits == [b"1", b"2", b"0", b"7", b"1", b"2"]


def test_decoding_says_nothing_for_special_ids_and_mends_broken_bytes(
    tokenizer: SentencePieceTokenizer,
) -> None:
    first_two = tokenizer.encode("\u2581")[:2]
    special = tokenizer.special
    ids = [special.begin_text, *tokenizer.encode("ab"), special.end_turn, *first_two, special.pad]
    beyond = [tokenizer.vocabulary_size, 10 * tokenizer.vocabulary_size]
    assert tokenizer.decode([*beyond, *ids]) == "ab\ufffd"


def test_a_lone_surrogate_is_refused(tokenizer: SentencePieceTokenizer) -> None:
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["fine", text])):
        with pytest.raises(DataError, match=r"lone surrogate '\\ud800' at character 2"):
            encode("ab\ud800")


def test_special_ids_are_the_published_ones() -> None:
    assert special_ids(65536) == SpecialIds(65504, 65505, 65506, 65507, 65508, 65509)
    assert special_ids(4096) == SpecialIds(4064, 4065, 4066, 4067, 4068, 4069)
    assert special_names()[:2] == ["<|begin_text|>", "<|end_text|>"]
    assert len(set(special_names())) == 32


def test_the_model_file_has_the_special_tokens_for_any_reader(tokenizer_folder: str) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(
        model_file=str(Path(tokenizer_folder) / "tokenizer.model")
    )
    special = special_ids(512)
    assert (model.bos_id(), model.eos_id(), model.pad_id()) == (480, 481, special.pad)
    assert model.id_to_piece(special.end_turn) == "<|end_turn|>"
    assert all(model.is_control(i) for i in range(480, 512))
    assert model.get_piece_size() == 512


def test_pieces_hold_line_breaks_and_runs_of_spaces(tmp_path: Path) -> None:
    config = command_config(tmp_path)
    model, _ = train(config.tokenizer, config.data)
    pieces = {SentencePieceTokenizer(model).token_bytes(i) for i in range(400)}
    assert b";\n" in pieces or b"value\n\n" in pieces or b"\n\n" in pieces
    assert b"    " in pieces


def test_training_depends_on_text_and_settings_alone(tmp_path: Path) -> None:
    config = command_config(tmp_path)
    models = []
    for threads in (1, 2):
        config.tokenizer.threads = threads
        model, sample = train(config.tokenizer, config.data)
        models.append((model, sample.fingerprint))
    assert models[0] == models[1]
    (tmp_path / "raw/b.txt").write_text("other words entirely, " * 50)
    model, sample = train(config.tokenizer, config.data)
    assert sample.fingerprint != models[0][1]
    assert model != models[0][0]


def test_too_large_a_vocabulary_is_refused_with_the_largest_possible(tmp_path: Path) -> None:
    config = command_config(tmp_path, vocabulary_size=60_000)
    with pytest.raises(DataError, match=r"vocabulary_size=60000 is more .* at most \d+") as error:
        train(config.tokenizer, config.data)
    largest = int(str(error.value).split("at most ")[1].split(".")[0])
    config.tokenizer.vocabulary_size = largest
    model, _ = train(config.tokenizer, config.data)
    assert SentencePieceTokenizer(model).vocabulary_size == largest
    config.tokenizer.vocabulary_size = largest + 1
    with pytest.raises(DataError, match=f"at most {largest}"):
        train(config.tokenizer, config.data)


def test_too_small_a_vocabulary_is_refused_with_the_least_possible(tmp_path: Path) -> None:
    config = command_config(tmp_path, vocabulary_size=320)
    with pytest.raises(DataError, match=r"vocabulary_size=320 is too small.* need \d+") as error:
        train(config.tokenizer, config.data)
    config.tokenizer.vocabulary_size = int(str(error.value).split("need ")[1].split(".")[0])
    train(config.tokenizer, config.data)


def test_a_vocabulary_without_room_for_bytes_is_refused(tmp_path: Path) -> None:
    config = command_config(tmp_path, vocabulary_size=288)
    with pytest.raises(ConfigError, match="vocabulary_size=288 leaves no room beside 256 bytes"):
        train(config.tokenizer, config.data)


def test_a_corpus_of_empty_documents_is_refused(tmp_path: Path) -> None:
    config = command_config(tmp_path)
    (tmp_path / "raw/a.txt").unlink()
    (tmp_path / "raw/a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="no documents with text"):
        train(config.tokenizer, config.data)


def test_a_record_without_text_is_named_and_nothing_else_said(tmp_path: Path) -> None:
    config = command_config(tmp_path)
    (tmp_path / "raw/a.jsonl").write_text('{"text": "hello"}\n' * 9 + '{"body": "x"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 10: has no 'text'") as error:
        train(config.tokenizer, config.data)
    assert "SentencePiece" not in str(error.value)


def test_the_sample_follows_the_weights(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(4):
            (tmp_path / name / f"{i}.jsonl").write_text('{"text": "0123456789"}\n' * 300)
    sources = {
        "a": SourceConfig(paths=["a/*.jsonl"], weight=3),
        "b": SourceConfig(paths=["b/*.jsonl"], weight=1),
    }
    config = DataConfig(
        name="mine", corpus=Corpus.files, root=str(tmp_path), shards="unused", context=8,
        sources=sources,
    )  # fmt: skip
    sample = Sample(config, 8000)
    assert "".join(sample.chunks()).count("0123456789") == 800
    # Each of the four files of a source gives its quarter, to the document.
    assert sample.source_bytes == {"a": 6000, "b": 2000}
    assert sample.documents == 800


def test_nothing_is_learned_from_files_that_are_held_out_by_name(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text/seen.txt").write_text("seen")
    (tmp_path / "text/kept.valid.txt").write_text("kept")
    config = DataConfig(
        name="mine", corpus=Corpus.files, root=str(tmp_path / "text"), shards="unused", context=8,
        valid_paths=["*.valid.txt"],
    )  # fmt: skip
    assert list(Sample(config, 8000).chunks()) == ["seen"]
    changed = command_config(tmp_path)
    known = training_settings(changed.tokenizer, changed.data)
    changed.data.valid_paths = ["*.valid.txt"]
    assert training_settings(changed.tokenizer, changed.data) != known


def test_shares_are_by_weight_or_else_by_size() -> None:
    def config(*weights: float | None) -> DataConfig:
        sources = {name: SourceConfig(weight=w) for name, w in zip("ab", weights, strict=True)}
        return DataConfig(
            name="mine", corpus=Corpus.files, root="r", shards="s", context=8, sources=sources
        )

    sizes = {"a": 10, "b": 30}
    assert source_shares(config(3, 1), sizes) == {"a": 0.75, "b": 0.25}
    assert source_shares(config(None, None), sizes) == {"a": 0.25, "b": 0.75}


def test_the_command_trains_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = command_config(tmp_path)
    main(config)
    assert "400 pieces from" in capsys.readouterr().out
    model = (tmp_path / "tokenizer/tokenizer.model").read_bytes()
    info = read_info(config.tokenizer.path)
    assert info["special"]["begin_text"] == 368
    assert info["corpus"]["source_bytes"] == {"mine": (tmp_path / "raw/a.txt").stat().st_size}
    stamp = (tmp_path / "tokenizer/tokenizer.model").stat().st_mtime_ns
    main(config)
    assert "trained before" in capsys.readouterr().out
    assert (tmp_path / "tokenizer/tokenizer.model").stat().st_mtime_ns == stamp
    assert Tokenizer.load(config.tokenizer.path).sha256 == SentencePieceTokenizer(model).sha256
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_of_jobs_that_train_at_once_the_first_to_finish_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, rival = command_config(tmp_path), command_config(tmp_path)

    def train_slowly(*arguments: Any) -> Any:
        trained = train(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(tokenizer_training, "train", train)
            main(rival)
        return trained

    monkeypatch.setattr(tokenizer_training, "train", train_slowly)
    main(config)
    first, second = capsys.readouterr().out.splitlines()
    assert "400 pieces from" in first
    assert "400 pieces, trained before" in second
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    # but not if it is another one
    shutil.rmtree(config.tokenizer.path)
    rival.tokenizer.vocabulary_size = 420
    with pytest.raises(DataError, match=r"tokenizer\.vocabulary_size: 420 there, 400 now"):
        main(config)


def test_the_command_refuses_a_tokenizer_of_other_settings(tmp_path: Path) -> None:
    config = command_config(tmp_path)
    main(config)
    config.tokenizer.vocabulary_size = 420
    config.data.max_bytes = 1000
    with pytest.raises(DataError) as error:
        main(config)
    message = str(error.value)
    assert "tokenizer.vocabulary_size: 400 there, 420 now" in message
    assert "data.max_bytes: None there, 1000 now" in message
    assert "Choose another tokenizer.path, or delete the folder" in message


def test_every_setting_that_changes_the_tokenizer_is_compared(tmp_path: Path) -> None:
    config = command_config(tmp_path)
    known = training_settings(config.tokenizer, config.data)
    for name, value in (("train_bytes", 9), ("vocabulary_size", 401), ("character_coverage", 0.5)):
        changed = command_config(tmp_path, **{name: value})
        assert training_settings(changed.tokenizer, changed.data) != known, name
    changed = command_config(tmp_path)
    changed.data.sources = {"a": SourceConfig(paths=["*"], weight=2)}
    assert training_settings(changed.tokenizer, changed.data)["data.sources.a.weight"] == 2
    changed = command_config(tmp_path, threads=1, path="elsewhere")
    assert training_settings(changed.tokenizer, changed.data) == known


def test_a_missing_or_damaged_tokenizer_is_named(tmp_path: Path, tokenizer_folder: str) -> None:
    with pytest.raises(DataError, match=r"No tokenizer at .*missing.*pretrain data tokenizer"):
        Tokenizer.load(tmp_path / "missing")
    model = (Path(tokenizer_folder) / "tokenizer.model").read_bytes()
    folder = tmp_path / "copy"
    info = describe(SentencePieceTokenizer(model), SENTENCEPIECE)
    write_folder(folder, {"tokenizer.model": model}, info)
    assert Tokenizer.load(folder).vocabulary_size == 512
    with pytest.raises(DataError, match=r"Cannot write the tokenizer to .*copy"):
        write_folder(folder, {"tokenizer.model": model}, info)
    (folder / "tokenizer.model").write_bytes(model[:-1] + b"?")
    with pytest.raises(DataError, match=r"has sha256 .*damaged or another one"):
        Tokenizer.load(folder)
    (folder / "tokenizer_info.json").write_text(json.dumps(info | {"format": 0}))
    with pytest.raises(DataError, match="has format 0, kind sentencepiece; this program reads 1"):
        Tokenizer.load(folder)
    (folder / "tokenizer_info.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_info.json is damaged"):
        Tokenizer.load(folder)


def test_a_model_without_our_special_tokens_is_refused(tokenizer_folder: str) -> None:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((Path(tokenizer_folder) / "tokenizer.model").read_bytes())
    del model.pieces[-1]
    with pytest.raises(DataError, match="last 32 pieces are not the special tokens"):
        SentencePieceTokenizer(model.SerializeToString())
