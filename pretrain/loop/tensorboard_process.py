"""The process that writes TensorBoard's files, so that nothing in that library can touch training.

Run by `tensorboard_sink`, never imported by it. Standard input has one JSON object a line: first
{"dir", "purge_from"}, then messages as `sink` makes them, at last {"finish": exit code}.
"""

import json
import signal
import sys
import time
from typing import Any

from torch.utils.tensorboard import SummaryWriter

# How long a point may wait for the disk: a watcher reloads every half minute.
_FLUSH_S = 10.0
NON_FINITE = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


def main() -> None:
    """Writes what arrives, by tokens; ends with code 1 if the disk refuses."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        # Signals for the job are for training; this process ends with its input.
        signal.signal(number, signal.SIG_IGN)
    start = json.loads(sys.stdin.readline())
    writer = SummaryWriter(start["dir"], purge_step=start["purge_from"])
    tokens, flushed = 0, time.monotonic()
    for line in sys.stdin:
        message = json.loads(line)
        if "finish" in message:
            break
        if "alert" in message:
            alert = message["alert"]
            writer.add_text(f"alert/{alert['title']}", alert["text"], tokens)
        else:
            tokens = message["record"]["tokens"]
            _add(writer, message, tokens)
        if time.monotonic() - flushed > _FLUSH_S:
            writer.flush()
            flushed = time.monotonic()
    writer.close()


def _add(writer: Any, message: dict[str, Any], tokens: int) -> None:
    for name, value in message["record"].items():
        value = NON_FINITE.get(value, value)
        if name != "tokens" and isinstance(value, int | float):
            writer.add_scalar(name, value, tokens)
    for name, given in message.get("histograms", {}).items():
        _add_histogram(writer, name, given["counts"], given["edges"], tokens)
    for name, columns in message.get("tables", {}).items():
        rows = [
            " | ".join(str(cell) for cell in row) for row in zip(*columns.values(), strict=True)
        ]
        head = [" | ".join(columns), " | ".join("---" for _ in columns)]
        writer.add_text(name, "\n".join(head + rows), tokens)
    for name, texts in message.get("texts", {}).items():
        writer.add_text(name, "\n\n".join(map(_as_code, texts)), tokens)


def _as_code(text: dict[str, Any]) -> str:
    """One row of texts in Markdown: numbers as a line, strings as they are, indented like code."""
    numbers = [f"{name} {cell}" for name, cell in text.items() if not isinstance(cell, str)]
    strings = "".join(cell for cell in text.values() if isinstance(cell, str))
    lines = [f"    {line}" for line in strings.splitlines()]
    return "\n".join([", ".join(numbers), "", *lines])


def _add_histogram(
    writer: Any, name: str, counts: list[int], edges: list[float], tokens: int
) -> None:
    # of the values themselves nothing is known but their bins: each stands for its upper edge
    upper, num = edges[1:], sum(counts)
    total = sum(count * edge for count, edge in zip(counts, upper, strict=True))
    squares = sum(count * edge**2 for count, edge in zip(counts, upper, strict=True))
    writer.add_histogram_raw(
        name, min=edges[0], max=edges[-1], num=num, sum=total, sum_squares=squares,
        bucket_limits=upper, bucket_counts=counts, global_step=tokens,
    )  # fmt: skip


if __name__ == "__main__":
    main()
