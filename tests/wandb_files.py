"""Reads W&B's offline files: framed as a LevelDB log, each record a protobuf; W&B has no reader."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK = 32768


def wandb_records(folder: Path) -> Iterator[Any]:
    """Records of the only .wandb file below a folder that has wandb/*run-*/."""
    (path,) = folder.glob("wandb/*run-*/*.wandb")
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    place, parts = 7, b""
    while place + 7 <= len(content):
        room = BLOCK - place % BLOCK
        _, length, kind = struct.unpack_from("<IHB", content, place)
        if room < 7 or kind == 0:
            place += room
            continue
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            message = wandb_internal_pb2.Record()
            message.ParseFromString(parts)
            parts = b""
            yield message


def values(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def history(folder: Path) -> list[dict[str, Any]]:
    """What was logged, oldest first."""
    return [values(m.history.item) for m in wandb_records(folder) if m.HasField("history")]
