"""Records of one file: txt, jsonl, jsonl.gz, jsonl.zst, parquet, read as streams.

A record is a text under the text key, or a chat: a list of turns under the text key or, if that
key is missing, under `messages`. Whatever is wrong with a file is a DataError that names it, the
record, and the remedy.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import zstandard

from pretrain.data.chat import Message, parse_messages
from pretrain.data.documents import cut_at_blank_lines
from pretrain.errors import DataError

BLOCK_BYTES = 1 << 20
# A larger text file is read as several documents, so that none has to fit into memory.
TEXT_FILE_CHARACTERS = 1 << 20
MESSAGES_KEY = "messages"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# What `zstd --long=31` makes, as some published corpora are; the library's limit is 128 MiB.
ZSTANDARD_WINDOW_BYTES = 1 << 31


class Record(NamedTuple):
    """One record; `number` counts a file's lines, rows, or pieces from 0."""

    number: int
    text: str
    messages: tuple[Message, ...] | None = None


def read_text(file: BinaryIO, name: str, text_key: str) -> Iterator[Record]:
    """A text file: one record up to 2**20 characters, beyond that cut at blank lines."""
    number, rest = 0, ""
    for block in _decode(file, name):
        *whole, rest = cut_at_blank_lines(rest + block, TEXT_FILE_CHARACTERS)
        for text in whole:
            yield Record(number, text)
            number += 1
    yield Record(number, rest)


def _decode(file: BinaryIO, name: str) -> Iterator[str]:
    """The file's text block by block; a character cut by a block's end waits for the next."""
    offset, buffer = 0, file.read(BLOCK_BYTES)
    if buffer.startswith(BYTE_ORDER_MARK):
        offset, buffer = len(BYTE_ORDER_MARK), buffer[len(BYTE_ORDER_MARK) :]
    while buffer:
        block = file.read(BLOCK_BYTES)
        try:
            yield buffer.decode("utf-8")
            decoded = len(buffer)
        except UnicodeDecodeError as error:
            if not block or error.reason != "unexpected end of data":
                raise _not_utf8(name, offset + error.start, buffer[error.start]) from error
            decoded = error.start
            yield buffer[:decoded].decode("utf-8")
        offset += decoded
        buffer = buffer[decoded:] + block


def read_lines(file: BinaryIO, name: str, text_key: str) -> Iterator[Record]:
    """JSON Lines; blank lines are no records, but count as lines."""
    offset = 0
    for number, line in enumerate(file):
        where = f"{name}, line {number + 1}"
        if number == 0:
            offset, line = _skip_byte_order_mark(line)
        try:
            content = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(where, offset + error.start, line[error.start]) from error
        offset += len(line)
        if content.strip():
            yield _record(number, _parse(content, where), where, text_key)


def _skip_byte_order_mark(line: bytes) -> tuple[int, bytes]:
    length = len(BYTE_ORDER_MARK) if line.startswith(BYTE_ORDER_MARK) else 0
    return length, line[length:]


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: is not JSON ({error}): {line[:60]!r}...; correct or remove the line."
        ) from error
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: is a JSON {type(record).__name__}; lines must be objects with a text key."
        )
    return record


def read_gzip_lines(file: BinaryIO, name: str, text_key: str) -> Iterator[Record]:
    """JSON Lines inside gzip, of any number of members."""
    errors = (EOFError, gzip.BadGzipFile, zlib.error)
    return _read_packed(gzip.GzipFile(fileobj=file), name, text_key, errors)  # type: ignore[arg-type]


def read_zstandard_lines(file: BinaryIO, name: str, text_key: str) -> Iterator[Record]:
    """JSON Lines inside zstandard, of any number of frames."""
    errors = (EOFError, zstandard.ZstdError)
    stream = io.BufferedReader(_ZstandardStream(file), BLOCK_BYTES)
    return _read_packed(stream, name, text_key, errors)


def _read_packed(
    stream: BinaryIO, name: str, text_key: str, errors: tuple[type[Exception], ...]
) -> Iterator[Record]:
    count = 0
    try:
        for record in read_lines(stream, name, text_key):
            yield record
            count += 1
    except errors as error:
        raise DataError(
            f"{name}: the compressed data is damaged or cut off after {count} records ({error}); "
            "copy the file again, or remove it."
        ) from error


class _ZstandardStream(io.RawIOBase):
    """Frames of a file, decompressed; unlike the library's reader it notices a missing end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = self._next_frame()
        self._is_between_frames = True
        self._packed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    @staticmethod
    def _next_frame() -> Any:
        return zstandard.ZstdDecompressor(max_window_size=ZSTANDARD_WINDOW_BYTES).decompressobj()

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._file.read(BLOCK_BYTES)
            if not self._packed:
                if self._is_between_frames:
                    return 0
                raise EOFError("the last zstandard frame has no end")
            self._ready = memoryview(self._frame.decompress(self._packed))
            self._is_between_frames = self._frame.eof
            self._packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = self._next_frame()
        length = min(len(buffer), len(self._ready))
        buffer[:length] = self._ready[:length]
        self._ready = self._ready[length:]
        return length


def read_parquet(file: BinaryIO, name: str, text_key: str) -> Iterator[Record]:
    """Rows of a parquet file; only the column that is needed is read."""
    # 0.1 s to import, and only this format needs it
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        columns = table.schema_arrow.names
        column = text_key if text_key in columns else MESSAGES_KEY
        if column not in columns:
            raise _missing_key(name, text_key, columns)
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
            for row in _rows(batch, f"{name}, rows {number} to {number + len(batch) - 1}"):
                yield _record(number, row, f"{name}, row {number}", text_key)
                number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{name}: is no parquet file, or damaged after {number} rows ({error}); copy it again, "
            "or remove it."
        ) from error


def _rows(batch: Any, where: str) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error.start, error.object[error.start]) from error
    return rows


def _record(number: int, record: dict[str, Any], where: str, text_key: str) -> Record:
    key = text_key if text_key in record else MESSAGES_KEY
    if key not in record:
        raise _missing_key(where, text_key, list(record))
    value = record[key]
    if isinstance(value, str):
        return Record(number, value)
    if isinstance(value, list):
        messages = parse_messages(value, where)
        return Record(number, "\n\n".join(message.content for message in messages), messages)
    raise DataError(
        f"{where}: {key!r} holds {type(value).__name__}, not text or a list of messages; correct "
        "or remove the record, or choose another data.text_key."
    )


def _missing_key(where: str, text_key: str, keys: list[str]) -> DataError:
    return DataError(
        f"{where}: has no {text_key!r} (and no {MESSAGES_KEY!r}); it has "
        f"{', '.join(keys) or 'nothing'}. Set data.text_key, or the "
        "source's text_key, to the one with text."
    )


def _not_utf8(where: str, offset: int, byte: int) -> DataError:
    return DataError(
        f"{where}: byte {offset} (0x{byte:02x}) is not UTF-8; convert the file with `iconv -f "
        "ENCODING -t UTF-8` (often LATIN1; UTF-16 if its first byte is 0xff or 0xfe), or remove it."
    )


READERS: dict[str, Callable[[BinaryIO, str, str], Iterator[Record]]] = {
    ".txt": read_text,
    ".jsonl": read_lines,
    ".jsonl.gz": read_gzip_lines,
    ".jsonl.zst": read_zstandard_lines,
    ".parquet": read_parquet,
}
"""The reader of each file suffix: (open file, name for messages, text key) to records."""


def reader_of(path: str) -> Callable[[BinaryIO, str, str], Iterator[Record]] | None:
    """The reader for a path by its suffix; None if no format has it."""
    lower = path.lower()
    return next((reader for suffix, reader in READERS.items() if lower.endswith(suffix)), None)
