"""The record of a run: metrics.jsonl, one JSON object a line. It is the truth about the run.

A record has `step`, and beside it keys named group/name_unit (`loss/nats`, `speed/tokens_per_s`).
Floats that JSON cannot spell are written as the strings NaN, Infinity and -Infinity, and read
back as floats, so that every line is valid JSON.
"""

import json
import logging
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pretrain.errors import DataError

log = logging.getLogger(__name__)

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
# Records that wait in memory while the disk refuses them; about 10 MB.
_MAX_WAITING = 10_000


class MetricLog:
    """Appends records to metrics.jsonl; a disk that is full delays them and never stops training.

    On resume, records after `resumed_step` belong to a life that was cut short: they move to
    metrics.discarded.jsonl beside it, together with a line torn by a crash.
    """

    def __init__(self, path: Path, *, resumed_step: int = 0) -> None:
        self._path = path
        self._waiting: deque[bytes] = deque(maxlen=_MAX_WAITING)
        self._has_warned = False
        path.parent.mkdir(parents=True, exist_ok=True)
        _discard_after(path, resumed_step)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._size = os.fstat(self._file).st_size

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record, which has `step`; it is in the file's page cache on return."""
        assert isinstance(record["step"], int), "a record without a step cannot be resumed"
        self._waiting.append(encode_record(record))
        try:
            while self._waiting:
                self._append(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            self._warn(error)
            return
        if self._has_warned:
            log.warning("%s can be written again; nothing was lost.", self._path)
            self._has_warned = False

    def sync(self) -> None:
        """Makes the records so far survive a power loss; called when a checkpoint is saved."""
        try:
            os.fsync(self._file)
        except OSError as error:
            self._warn(error)

    def close(self) -> None:
        """Syncs and closes the file."""
        self.sync()
        os.close(self._file)
        if self._waiting:
            log.error(
                "%d records never reached %s; the last error is above.",
                len(self._waiting),
                self._path,
            )

    def _append(self, line: bytes) -> None:
        """Writes all of the line or none of it."""
        view = memoryview(line)
        try:
            while view:
                view = view[os.write(self._file, view) :]
        except OSError:
            os.ftruncate(self._file, self._size)
            raise
        self._size += len(line)

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            log.warning(
                "%s cannot be written (%s); up to %d records wait in memory.",
                self._path,
                error.strerror,
                _MAX_WAITING,
            )
        self._has_warned = True


def encode_record(record: Mapping[str, Any]) -> bytes:
    """One line of JSON, newline included."""
    plain = {key: _encode_value(value) for key, value in record.items()}
    return json.dumps(plain, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records, oldest first; a last line that a crash tore is left out.

    Raises DataError if the file is missing or another line is not a record.
    """
    records = []
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        raise DataError(f"There is no {path}; is {path.parent} the folder of a run?") from None
    for number, line in enumerate(lines, start=1):
        record = decode_record(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            raise DataError(
                f"{path} line {number} of {len(lines)} is not a record: {line[:60]!r}. Resuming "
                "the run moves such lines to metrics.discarded.jsonl; or remove it by hand."
            )
    return records


def _encode_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, list | tuple):
        return [_encode_value(item) for item in value]
    return value


def _decode_value(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, list):
        return [_decode_value(item) for item in value]
    return value


def decode_record(line: bytes) -> dict[str, Any] | None:
    """The record of one line, or None if the line is torn or damaged."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None
    return {key: _decode_value(value) for key, value in record.items()}


def _discard_after(path: Path, step: int) -> None:
    """Moves what is torn, damaged, or later than `step` out of the file, without loss."""
    if not path.exists():
        return
    discarded = [line for line, is_kept in _judge(path, step) if not is_kept]
    if not discarded:
        return
    aside = path.with_name("metrics.discarded.jsonl")
    log.warning(
        "%d lines of %s are later than step %d or torn; they are now in %s.",
        len(discarded),
        path,
        step,
        aside.name,
    )
    with aside.open("ab") as file:
        file.writelines(line if line.endswith(b"\n") else line + b"\n" for line in discarded)
        file.flush()
        os.fsync(file.fileno())
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.writelines(line for line, is_kept in _judge(path, step) if is_kept)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _judge(path: Path, step: int) -> Iterator[tuple[bytes, bool]]:
    """Each line and whether it stays."""
    with path.open("rb") as file:
        for line in file:
            record = decode_record(line)
            yield line, record is not None and record["step"] <= step
