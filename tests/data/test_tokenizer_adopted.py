"""A tokenizer that came with weights: AutoTokenizer's ids for text and chats, or a refusal."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pretrain.data.build import build
from pretrain.data.chat import Message
from pretrain.data.config import Corpus, DataConfig
from pretrain.data.documents import Document
from pretrain.data.encode import encode_document, encode_documents, encode_prompt
from pretrain.data.tokenizer import Tokenizer
from pretrain.data.tokenizer_adopted import adopt_tokenizer
from pretrain.data.verify import verify
from pretrain.errors import DataError

VOCABULARY_SIZE = 600
GPT2 = {"bos": "<|endoftext|>", "eos": "<|endoftext|>"}
LLAMA = {"bos": "<s>", "eos": "</s>", "pad": "<pad>"}
KINDS: dict[str, dict[str, Any]] = {
    "published": {"splits_digits": True, "frames": True},
    "plain": {},
    "gpt2": {"special": GPT2},
    "llama": {"special": LLAMA, "frames": True},
}
NASTY = [
    "",
    " ",
    "plain words, and more of them.",
    "naïve 日本語 \U0001f916\u200d\U0001f469\u200d\U0001f4bb A\u030a ﬁ",
    "line\r\nbreaks\r\n\r\n\tand\ttabs\n\n\n",
    "runs   of      spaces" + 40 * " " + "\n" + 70 * "\n",
    "0123456789 3.14159 1e-9 ٣٤٥ Ⅷ½",
    "\u2581marks \u2581\u2581 and \0 NUL \x7f \x1b[0m \ufeff \ufffd \u2028",
    "unassigned \u0378 \U000e0080 private \ue000 noncharacter \ufdd0 \uffff",
    "spelled <|begin_text|>inside<|end_turn|> <|pad|>\n<|endoftext|> <s>x</s> <|begin_",
    "long " * 20_000 + "x" * 30_000 + "\n  def f(x):\n" * 2_000,
]
CHAT = (
    Message("system", "Be brief."),
    Message("user", "  2 + 3?\n"),
    Message("Huginn", "\n\n  5<|end_turn|>\n"),
)


@pytest.fixture(scope="module")
def folders(
    published_tokenizer: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("adopted")
    for name, options in KINDS.items():
        published_tokenizer(root / "theirs" / name, VOCABULARY_SIZE, **options)
        source, target = root / "theirs" / name, root / "ours" / name
        adopt_tokenizer(source, target, vocabulary_size=VOCABULARY_SIZE)
    return root


@pytest.fixture(scope="module")
def pairs(folders: Path) -> dict[str, tuple[Tokenizer, Any]]:
    """Our tokenizer and AutoTokenizer's, of the same files."""
    transformers = pytest.importorskip("transformers")
    return {
        name: (
            Tokenizer.load(folders / "ours" / name),
            transformers.AutoTokenizer.from_pretrained(folders / "theirs" / name),
        )
        for name in KINDS
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_has_the_ids_of_auto_tokenizer_between_its_frame(
    pairs: dict[str, tuple[Tokenizer, Any]], kind: str
) -> None:
    ours, theirs = pairs[kind]
    documents = [Document(f"s/a#{i}", text) for i, text in enumerate(NASTY)]
    encoded = encode_documents(ours, documents)
    for text, ids in zip(NASTY, encoded, strict=True):
        body = theirs(text, add_special_tokens=False).input_ids
        assert ids == [theirs.bos_token_id, *body, theirs.eos_token_id], text[:60]
    assert encode_documents(ours, documents, threads=2) == encoded


@given(st.text(st.characters(codec="utf-8")) | st.text(" \u2581\n\t\r\0a1<|>_end text"))
@example("<|end_text|><|end_text|> <s>")
@settings(max_examples=150, deadline=None)
def test_any_text_has_the_ids_of_auto_tokenizer_and_comes_back(
    pairs: dict[str, tuple[Tokenizer, Any]], text: str
) -> None:
    for ours, theirs in pairs.values():
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False).input_ids
        if not set(ids) & set(ours.special_names):
            assert ours.decode(ids) == text


def test_a_chat_has_the_ids_of_its_written_out_template(
    pairs: dict[str, tuple[Tokenizer, Any]],
) -> None:
    ours, theirs = pairs["published"]
    turns = "".join(
        f"<|begin_header|>{message.role}<|end_header|>\n\n{message.content.strip()}<|end_turn|>"
        for message in CHAT
    )
    written = theirs(f"<|begin_text|>{turns}<|end_text|>", add_special_tokens=False).input_ids
    assert encode_document(ours, Document("s/a#0", "unused", CHAT)) == written
    prompt = f"<|begin_text|>{turns}<|begin_header|>Huginn<|end_header|>\n\n"
    assert encode_prompt(ours, CHAT) == theirs(prompt, add_special_tokens=False).input_ids
    assert ours.special.stops() == [1, 4]


def test_a_chat_is_refused_by_name_where_there_are_no_tokens_for_turns(
    pairs: dict[str, tuple[Tokenizer, Any]],
) -> None:
    ours, _ = pairs["llama"]
    documents = [Document("s/a#0", "text"), Document("s/a#1", "said", CHAT)]
    with pytest.raises(DataError, match=r"s/a#1 is a chat, .* no <\|begin_header\|>, <\|end_h"):
        encode_documents(ours, documents)
    assert encode_document(ours, documents[0])[:1] == [ours.special.begin_text]


def test_special_ids_are_found_by_name_or_by_role(folders: Path) -> None:
    found = {name: Tokenizer.load(folders / "ours" / name).special for name in KINDS}
    assert found["published"] == found["plain"] == (0, 1, 2, 3, 4, 5)
    assert found["gpt2"] == (0, 0, None, None, None, 0)
    assert found["gpt2"].stops() == [0]
    assert found["llama"] == (0, 1, None, None, None, 2)


def test_tokens_that_only_the_configuration_names_are_added_as_transformers_adds_them(
    folders: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    source = copy_of(folders / "theirs/gpt2", tmp_path / "theirs")
    edit(
        source,
        pad_token="<|new_pad|>",
        additional_special_tokens=["<|extra|>", "the"],
        added_tokens_decoder={
            "0": {"content": "<|endoftext|>", "special": True},
            "600": {"content": "added", "single_word": True, "normalized": False, "special": False},
        },
    )
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    ours = adopt_tokenizer(source, tmp_path / "ours", vocabulary_size=700)
    assert ours.vocabulary_size == len(theirs) == 603
    for text in ["the added <|extra|> readded the<|new_pad|>", *NASTY]:
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
    assert (ours.special.pad, ours.encode("added")) == (theirs.pad_token_id, [600])
    with pytest.raises(DataError, match=r"Wrong vocabulary: .* up to 602, .* has 602 embeddings"):
        adopt_tokenizer(source, tmp_path / "too small", vocabulary_size=602)


def test_special_tokens_stay_text_if_the_configuration_says_so(
    folders: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    source = copy_of(folders / "theirs/plain", tmp_path / "theirs")
    edit(source, split_special_tokens=True)
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    ours = adopt_tokenizer(source, tmp_path / "ours", vocabulary_size=VOCABULARY_SIZE)
    ids = ours.encode("a<|end_text|>b")
    assert ids == theirs("a<|end_text|>b", add_special_tokens=False).input_ids
    assert 1 not in ids


def test_limits_of_length_in_the_file_do_not_cut_documents(folders: Path, tmp_path: Path) -> None:
    source = copy_of(folders / "theirs/plain", tmp_path / "theirs")
    rules = json.loads((source / "tokenizer.json").read_text())
    rules["truncation"] = {
        "direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    (source / "tokenizer.json").write_text(json.dumps(rules))
    ours = adopt_tokenizer(source, tmp_path / "ours", vocabulary_size=VOCABULARY_SIZE)
    assert ours.encode(NASTY[-1]) == Tokenizer.load(folders / "ours/plain").encode(NASTY[-1])


def test_an_export_has_the_files_as_they_were(folders: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folders / "ours/published")
    assert tokenizer.export(tmp_path / "out") == {
        "bos_token_id": 0, "eos_token_id": [1, 4], "pad_token_id": 5,
    }  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        theirs = (folders / "theirs/published" / name).read_bytes()
        assert (tmp_path / "out" / name).read_bytes() == theirs
    again = adopt_tokenizer(
        tmp_path / "out", tmp_path / "again", vocabulary_size=tokenizer.vocabulary_size
    )
    assert again.sha256 == tokenizer.sha256


def test_an_export_without_configuration_gets_one_that_auto_tokenizer_can_use(
    folders: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    source = copy_of(folders / "theirs/plain", tmp_path / "theirs")
    (source / "tokenizer_config.json").unlink()
    ours = adopt_tokenizer(source, tmp_path / "ours", vocabulary_size=VOCABULARY_SIZE)
    ours.export(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(NASTY[3], add_special_tokens=False).input_ids == ours.encode(NASTY[3])
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 5)


def test_what_versions_of_transformers_read_differently_is_said(
    folders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = copy_of(folders / "theirs/plain", tmp_path / "theirs")
    rules = json.loads((source / "tokenizer.json").read_text())
    rules["pre_tokenizer"] = {
        "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True,
    }  # fmt: skip
    (source / "tokenizer.json").write_text(json.dumps(rules))
    edit(source, tokenizer_class="T5TokenizerFast")
    adopt_tokenizer(source, tmp_path / "ours", vocabulary_size=VOCABULARY_SIZE)
    assert "add_prefix_space=False, but tokenizer.json says otherwise" in caplog.text
    assert "tokenizer_class=T5TokenizerFast may change the rules" in caplog.text


def test_what_is_no_tokenizer_is_refused(folders: Path, tmp_path: Path) -> None:
    def adopt(source: Path) -> None:
        adopt_tokenizer(source, tmp_path / "ours", vocabulary_size=VOCABULARY_SIZE)

    source = copy_of(folders / "theirs/llama", tmp_path / "theirs")
    whole = (source / "tokenizer.json").read_bytes()
    (source / "tokenizer_config.json").write_text("{}")
    with pytest.raises(
        DataError, match=r"neither <\|begin_text\|> nor <\|end_text\|>, .*bos_token"
    ):
        adopt(source)
    (source / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match=r"tokenizer_config.json holds a list"):
        adopt(source)
    (source / "tokenizer_config.json").unlink()
    (source / "tokenizer.json").write_bytes(whole[:-100])
    with pytest.raises(DataError, match=r"tokenizer.json is damaged or no tokenizer: .*EOF"):
        adopt(source)
    (source / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer.json: No such file.* tokenizer.path="):
        adopt(source)
    assert not (tmp_path / "ours").exists()
    with pytest.raises(DataError, match=r"pretrain adopt hf=.*plain` takes a tokenizer\.json over"):
        Tokenizer.load(folders / "theirs/plain")


def test_shards_of_documents_that_spell_begin_text_are_whole(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "text/mine").mkdir(parents=True)
    records = [{"text": "<|begin_text|>" * n + "end"} for n in range(40)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "text/mine/a.jsonl").write_text(lines)
    config = DataConfig(
        name="t", corpus=Corpus.files, root=str(tmp_path / "text"), context=7,
        shards=str(tmp_path / "shards"), build_workers=1, valid_fraction=0.0,
    )  # fmt: skip
    manifest = build(config, str(folders / "ours/published"))
    assert manifest.tokenizer.special["end_turn"] == 4
    totals = manifest.source("mine").totals("train")
    ours = Tokenizer.load(folders / "ours/published")
    assert totals.documents == 40
    assert totals.tokens == sum(len(ours.encode(record["text"])) + 2 for record in records)
    assert verify(config, manifest) == []
    (tmp_path / "text/mine/a.jsonl").unlink()
    (tmp_path / "text/mine/b.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "?"}]})
    )
    config.shards = str(tmp_path / "others")
    with pytest.raises(DataError, match=r"mine/mine/b\.jsonl#0 is a chat"):
        build(config, str(folders / "ours/llama"))


def test_a_damaged_copy_is_refused(folders: Path, tmp_path: Path) -> None:
    folder = copy_of(folders / "ours/plain", tmp_path / "ours")
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(DataError, match=r"tokenizer.json has sha256 .*damaged or another one"):
        Tokenizer.load(folder)
    path.unlink()
    with pytest.raises(DataError, match=r"tokenizer.json: No such file"):
        Tokenizer.load(folder)


def test_a_lone_surrogate_is_refused(folders: Path) -> None:
    tokenizer = Tokenizer.load(folders / "ours/plain")
    with pytest.raises(DataError, match=r"lone surrogate '\\ud800' at character 2"):
        tokenizer.encode("ab\ud800")


def copy_of(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def edit(folder: Path, **values: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
