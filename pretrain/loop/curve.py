"""One clean curve from a record that several lives have written: last writer wins."""

from collections.abc import Iterable
from typing import Any

# What a record is about, by a key that every such record has.
STEP, VALIDATION, SAVE = "loss/nats", "validation/loss_nats", "checkpoint/step"


def clean_curve(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each step, validation and save once, in order of steps.

    A step that is taken again takes with it all that was recorded from there on: the life that
    wrote it had gone back. What else is said twice of one step counts as it was said last.
    """
    kept: list[dict[str, Any]] = []
    for record in records:
        if STEP in record:
            while kept and kept[-1]["step"] >= record["step"]:
                kept.pop()
        else:
            about = _about(record)
            kept = [old for old in kept if (old["step"], _about(old)) != (record["step"], about)]
        kept.append(record)
    return kept


def _about(record: dict[str, Any]) -> str | None:
    return next((key for key in (STEP, VALIDATION, SAVE) if key in record), None)
