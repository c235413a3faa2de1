"""Reading records: every format gives the same documents, every damage is named."""

import gzip
import io
import json
from collections.abc import Iterator

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data import records
from pretrain.data.chat import Message
from pretrain.data.records import READERS, Record, reader_of
from pretrain.errors import DataError

TEXTS = ["first\n  second\n", "na\u00efve \u65e5\u672c\u8a9e \U0001f916", "", "a\u2581b\r\n"]


def lines(rows: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(columns: dict[str, list[object]]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file, row_group_size=2)
    return file.getvalue()


def read(content: bytes, suffix: str, text_key: str = "text") -> Iterator[Record]:
    reader = reader_of(f"folder/name{suffix}")
    assert reader is not None
    return reader(io.BytesIO(content), f"name{suffix}", text_key)


def test_every_format_of_records_gives_the_same() -> None:
    plain = lines([{"text": text, "other": 1} for text in TEXTS])
    stored = {
        ".jsonl": plain,
        ".jsonl.gz": gzip.compress(plain[:50]) + gzip.compress(plain[50:]),
        ".jsonl.zst": zstandard.compress(plain[:50]) + zstandard.compress(plain[50:]),
        ".parquet": parquet({"text": list(TEXTS), "other": [1] * len(TEXTS)}),
    }
    assert stored.keys() | {".txt"} == READERS.keys()
    expected = [Record(i, text) for i, text in enumerate(TEXTS)]
    for suffix, content in stored.items():
        assert list(read(content, suffix)) == expected, suffix


def test_suffixes_are_matched_whole_and_in_any_case() -> None:
    assert reader_of("A.TXT") is records.read_text
    assert reader_of("a.jsonl.gz") is records.read_gzip_lines
    assert reader_of("a.gz") is None
    assert reader_of("txt") is None


def test_blank_lines_count_as_lines_but_are_no_records() -> None:
    assert [r.number for r in read(b'{"text": "a"}\n\n  \n{"text": "b"}', ".jsonl")] == [0, 3]


def test_a_byte_order_mark_is_no_text() -> None:
    assert list(read(b'\xef\xbb\xbf{"text": "a"}', ".jsonl")) == [Record(0, "a")]
    assert list(read(b"\xef\xbb\xbfa", ".txt")) == [Record(0, "a")]


@pytest.mark.parametrize("length", [0, 1, 7, 2**20 - 1, 2**20, 2**20 + 1, 2_500_000])
def test_text_files_are_read_whole_whatever_their_length(length: int) -> None:
    # Three bytes a character, so that blocks end inside characters.
    text = ("\u65e5\u672c\n" * (length // 3 + 1))[:length]
    found = list(read(text.encode(), ".txt"))
    assert "".join(record.text for record in found) == text
    assert [record.number for record in found] == list(range(len(found)))
    assert all(len(record.text) <= records.TEXT_FILE_CHARACTERS for record in found)


@given(st.text(max_size=40), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_text_survives_any_block_size(text: str, block: int, most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "BLOCK_BYTES", block)
        patch.setattr(records, "TEXT_FILE_CHARACTERS", most)
        # A byte order mark at the start would be dropped, so there is none.
        text = "x" + text
        assert "".join(r.text for r in read(text.encode(), ".txt")) == text


@pytest.mark.parametrize("before", [0, 5, 2**20 - 1, 2**20 + 3])
def test_a_byte_that_is_not_utf8_is_named_by_offset(before: int) -> None:
    with pytest.raises(DataError, match=rf"name.txt: byte {before} \(0xff\) is not UTF-8.*iconv"):
        list(read(b"a" * before + b"\xff" + b"b" * 9, ".txt"))


def test_a_character_cut_off_at_the_end_is_an_error() -> None:
    with pytest.raises(DataError, match="byte 3 "):
        list(read("abc\u65e5".encode()[:-1], ".txt"))


def test_a_byte_that_is_not_utf8_is_named_by_line_and_offset() -> None:
    content = b'{"text": "a"}\n{"text": "\xe9"}\n'
    with pytest.raises(DataError, match=r"name.jsonl, line 2: byte 24 \(0xe9\)"):
        list(read(content, ".jsonl"))


PACKED = [
    pytest.param(".jsonl.gz", gzip.compress, id="gzip"),
    pytest.param(".jsonl.zst", zstandard.compress, id="zstandard"),
]


@pytest.mark.parametrize(("suffix", "compress"), PACKED)
def test_no_truncation_of_compressed_lines_goes_unseen(suffix: str, compress) -> None:  # type: ignore[no-untyped-def]
    rows = [{"text": f"text number {i} {i * i}"} for i in range(30)]
    packed = compress(lines(rows))
    assert len(list(read(packed, suffix))) == 30
    for end in range(1, len(packed)):
        with pytest.raises(DataError, match=r"damaged or cut off after \d+ records.*copy the file"):
            list(read(packed[:end], suffix))


@pytest.mark.parametrize(("suffix", "compress"), PACKED)
def test_damage_inside_compressed_lines_says_how_much_was_read(suffix: str, compress) -> None:  # type: ignore[no-untyped-def]
    good = compress(lines([{"text": "good"}] * 3))
    with pytest.raises(DataError, match="after 3 records"):
        list(read(good + b"this is not compressed", suffix))


def test_a_long_window_is_no_damage() -> None:
    rows = lines([{"text": "a"}] * 9)
    long = zstandard.ZstdCompressionParameters(window_log=31, write_content_size=0)
    packer = zstandard.ZstdCompressor(compression_params=long).compressobj()
    packed = packer.compress(rows) + packer.flush()
    assert len(list(read(packed, ".jsonl.zst"))) == 9


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"line 2: is not JSON \(.*\): '\{not json"),
        (
            '{"text": "a", "tree": ' + "[" * 100_000 + "]" * 100_000 + "}",
            r"line 2: is not JSON \(maximum recursion depth",
        ),
        ('["a"]', "line 2: is a JSON list; lines must be objects"),
        (
            '{"body": "a", "title": "b"}',
            "line 2: has no 'text'.*it has body, title. Set data.text_",
        ),
        ("{}", "line 2: has no 'text'.*it has nothing"),
        ('{"text": null}', "line 2: 'text' holds NoneType"),
        ('{"text": 3}', "line 2: 'text' holds int, not text"),
        ('{"messages": []}', "line 2: the chat has no messages"),
        ('{"messages": ["a"]}', "line 2, message 0: is a str"),
        ('{"messages": [{"role": "user"}]}', r"message 0: needs text .* keys \['role'\]"),
        ('{"messages": [{"role": "cat", "content": "a"}]}', "role 'cat' is unknown; use one of"),
    ],
)
def test_a_bad_line_is_named_with_the_remedy(line: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(read(b'{"text": "a"}\n' + line.encode(), ".jsonl"))


def test_chats_are_found_under_messages_or_under_the_text_key() -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    other = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    expected = (Message("user", "Hi"), Message("Huginn", "Hello"))
    content = lines([{"messages": turns, "id": 1}, {"text": "plain", "messages": turns}])
    chat, plain = read(content, ".jsonl")
    assert chat == Record(0, "Hi\n\nHello", expected)
    assert plain == Record(1, "plain")
    assert next(read(lines([{"conversations": other}]), ".jsonl", "conversations")) == chat
    assert next(read(parquet({"messages": [turns]}), ".parquet")) == chat


def test_parquet_names_what_is_wrong() -> None:
    with pytest.raises(DataError, match=r"has no 'text'.*it has body, title"):
        list(read(parquet({"body": ["a"], "title": ["b"]}), ".parquet"))
    with pytest.raises(DataError, match=r"name.parquet, row 2: 'text' holds NoneType"):
        list(read(parquet({"text": ["a", "b", None]}), ".parquet"))
    with pytest.raises(DataError, match="row 0: 'text' holds int"):
        list(read(parquet({"text": [1]}), ".parquet"))
    with pytest.raises(DataError, match="is no parquet file, or damaged after 0 rows"):
        list(read(b"PAR1 and then nothing of the kind", ".parquet"))
    broken = pyarrow.array([b"a\xff"]).view(pyarrow.string())
    with pytest.raises(DataError, match=r"rows 0 to 0: byte 1 .* is not UTF-8"):
        list(read(parquet({"text": broken}), ".parquet"))
