"""Our SentencePiece tokenizer for Hugging Face programs: the same ids, whatever the text."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pretrain.config import TrainConfig
from pretrain.data.chat import Message, parse_messages
from pretrain.data.config import Corpus, DataConfig, TokenizerConfig
from pretrain.data.documents import Document
from pretrain.data.encode import encode_document, encode_prompt
from pretrain.data.special_ids import special_names
from pretrain.data.tokenizer import Tokenizer, main
from pretrain.data.tokenizer_adopted import adopt_tokenizer
from pretrain.data.tokenizer_export import _cut_order, _merges

REPOSITORY = Path(__file__).resolve().parents[2]
TRANSFORMERS_4 = REPOSITORY / ".venv-transformers-4/bin/python"
CHAT = [
    {"role": "system", "content": "def f():\n\n    return 1"},
    {"role": "human", "content": "  2 + 3?\n"},
    {"role": "assistant", "content": "\n\n  test_5\n"},
    {"role": "user", "content": ""},
]
# characters whose pieces overlap in many ways: runs, and pieces that end as they begin
OVERLAPPING = (
    st.text(st.sampled_from(' \n-="#.aetsx')) | st.text(st.sampled_from(" ")) | st.text("-=")
)
ANY_TEXT = st.text(st.characters(codec="utf-8")) | st.text(" \u2581\n\t\r\0a1<|>_") | OVERLAPPING


@pytest.fixture(scope="module")
def exported(tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    Tokenizer.load(tokenizer_folder).export(folder)
    return folder


@pytest.fixture(scope="module")
def ours(tokenizer_folder: str) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture(scope="module")
def theirs(exported: Path) -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(exported)


def real_texts() -> Iterator[str]:
    for path in sorted((REPOSITORY / "pretrain").rglob("*.py")):
        yield path.read_text()


def long_texts() -> Iterator[str]:
    """Texts that are cut: at line breaks, without any, around U+2581, exactly at the limit."""
    yield "x" * 50_000
    yield "x" * 100_001
    yield "ab\n" * 40_000
    yield ("w" * 49_999 + "\n") * 2 + "end"
    yield ("w" * 50_000 + "\n") * 2
    yield "a \u2581b" * 20_000
    yield "word " * 11_000 + "\u2581" + "y" * 60_000 + "\nend  "


@given(ANY_TEXT)
@example("")
@example("   \u2581 \u2581\u2581<unk><0x0A>\0\ufffd")
@example("\n\n\ufdd1 \ufdd0")
@settings(max_examples=500, deadline=None)
def test_any_text_has_the_same_ids_and_comes_back(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert ids == ours.encode(text)
    assert theirs.decode(ids) == text


def test_real_texts_have_the_same_ids(ours: Tokenizer, theirs: Any) -> None:
    for text in real_texts():
        ids = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ids == ours.encode(text)


def test_long_texts_are_cut_at_the_same_places(ours: Tokenizer, theirs: Any) -> None:
    for text in long_texts():
        assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text), text[:20]


def test_begin_text_is_put_first_unless_told_otherwise(ours: Tokenizer, theirs: Any) -> None:
    assert theirs("a b").input_ids == [ours.special.begin_text, *ours.encode("a b")]
    special = ours.special
    found = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert found == (special.begin_text, special.end_text, special.pad)
    assert theirs.convert_tokens_to_ids(special_names()) == list(ours.special_names)


def test_spelled_special_tokens_are_read_as_such_unless_split(ours: Tokenizer, theirs: Any) -> None:
    text = "a<|end_turn|>b"
    ids = theirs(text, add_special_tokens=False).input_ids
    assert ids == [*ours.encode("a"), ours.special.end_turn, *ours.encode("b")]
    split = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert split == ours.encode(text)
    assert theirs.decode(ids, skip_special_tokens=True) == "ab"


@given(st.lists(ANY_TEXT, min_size=1, max_size=4))
@example(["\n\nif", "  in", "\n"])
@settings(max_examples=100, deadline=None)
def test_a_chat_has_the_same_ids(ours: Tokenizer, theirs: Any, contents: list[str]) -> None:
    contents = [text.replace("<|", "") for text in contents]
    turns = [Message(("user", "Huginn")[i % 2], text) for i, text in enumerate(contents)]
    raw = [turn._asdict() for turn in turns]
    document = encode_document(ours, Document("s/a#0", "unused", tuple(turns)))
    assert theirs.apply_chat_template(raw, return_dict=False) == document
    prompt = theirs.apply_chat_template(raw, add_generation_prompt=True, return_dict=False)
    assert prompt == encode_prompt(ours, turns)


def test_a_role_that_is_not_known_is_refused_by_the_template(theirs: Any) -> None:
    with pytest.raises(Exception, match="unknown role wizard"):
        theirs.apply_chat_template([{"role": "wizard", "content": "abracadabra"}])


def test_an_export_is_adopted_as_the_tokenizer_that_it_was(
    ours: Tokenizer, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = adopt_tokenizer(exported, tmp_path / "again", vocabulary_size=512)
    assert again.sha256 == ours.sha256
    assert (tmp_path / "again/tokenizer.model").is_file()
    tokenizer = TokenizerConfig(path=str(tmp_path / "again"), vocabulary_size=512)
    data = DataConfig(name="t", corpus=Corpus.embedded, shards="unused", context=8)
    main(cast(TrainConfig, SimpleNamespace(tokenizer=tokenizer, data=data)))
    assert "512 pieces, adopted with the weights" in capsys.readouterr().out


def test_what_overlaps_is_joined_from_the_left() -> None:
    # in "ab", "aba", "ba" both neighbours make "ababa"; the left ones must come first
    assert sorted((2, 3), key=lambda cut: _cut_order("ababa", cut)) == [2, 3]
    assert sorted((1, 2), key=lambda cut: _cut_order("ror", cut)) == [2, 1]
    pieces = {"a": 0.0, "aa": -1.0, "aaa": -2.0, "b": -3.0}
    assert list(_merges(pieces)) == [("a", "a"), ("aa", "a"), ("a", "aa")]


WITH_TRANSFORMERS_4 = """
import json, sys
from transformers import AutoTokenizer, __version__
assert __version__.startswith("4."), __version__
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
asked = json.load(sys.stdin)
split = dict(add_special_tokens=False, split_special_tokens=True)
print(json.dumps({
    "ids": [tokenizer(text, **split).input_ids for text in asked["texts"]],
    "framed": tokenizer("a b").input_ids,
    "chat": tokenizer.apply_chat_template(asked["chat"]),
    "back": [tokenizer.decode(tokenizer(text, **split).input_ids) for text in asked["texts"]],
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not TRANSFORMERS_4.is_file(), reason="needs .venv-transformers-4")
def test_transformers_4_gives_the_same_ids(ours: Tokenizer, exported: Path) -> None:
    texts = [*real_texts(), *long_texts(), "   \u2581 \u2581\u2581<unk><0x0A>\0<|pad|>\ufdd0"]
    done = subprocess.run(
        [str(TRANSFORMERS_4), "-c", WITH_TRANSFORMERS_4, str(exported)],
        input=json.dumps({"texts": texts, "chat": CHAT}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ids"] == [ours.encode(text) for text in texts]
    assert found["back"] == texts
    assert found["framed"] == [ours.special.begin_text, *ours.encode("a b")]
    chat = parse_messages(CHAT, "the chat")
    assert found["chat"] == encode_document(ours, Document("s/a#0", "unused", chat))
