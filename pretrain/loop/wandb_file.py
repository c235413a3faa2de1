"""How many points an offline W&B file has: on a full disk W&B loses them and says nothing.

The file is a log of blocks (as LevelDB has it): a header of 7 bytes, then fragments of protobuf
records, each with a checksum, a length, and whether it is whole, first, middle or last.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

from wandb.proto import wandb_internal_pb2

_FILE_HEADER, _HEADER, _BLOCK = 7, 7, 32768
_WHOLE, _LAST = 1, 4


def count_points(path: Path) -> int:
    """Points of the history that are whole in the file."""
    found = 0
    for content in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        found += record.HasField("history")
    return found


def _records(content: bytes) -> Iterator[bytes]:
    place, parts = _FILE_HEADER, b""
    while place + _HEADER <= len(content):
        room = _BLOCK - place % _BLOCK
        _, length, kind = struct.unpack_from("<IHB", content, place)
        if room < _HEADER or kind == 0:
            # what is left of a block is padding
            place += room
            continue
        body = content[place + _HEADER : place + _HEADER + length]
        place += _HEADER + length
        if len(body) < length:
            return
        parts += body
        if kind in (_WHOLE, _LAST):
            yield parts
            parts = b""
