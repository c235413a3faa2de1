"""Chats: who spoke and what was said. How they become ids is in encode.py.

The model's own role is called Huginn, as in the published chat template (arXiv 2502.05171).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from pretrain.errors import DataError

MODEL_ROLE = "Huginn"
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "Huginn": MODEL_ROLE,
    "assistant": MODEL_ROLE,
    "gpt": MODEL_ROLE,
}
"""Names that corpora use, and ours."""


class Message(NamedTuple):
    """One turn of a chat; role is system, user or Huginn."""

    role: str
    content: str


def parse_messages(raw: Sequence[Any], where: str) -> tuple[Message, ...]:
    """Turns from records like {"role": ..., "content": ...} or {"from": ..., "value": ...}.

    Raises DataError, naming `where` and the turn, for other shapes and unknown roles.
    """
    if not raw:
        raise DataError(f"{where}: the chat has no messages; remove the record.")
    return tuple(_parse_message(turn, f"{where}, message {i}") for i, turn in enumerate(raw))


def _parse_message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise DataError(
            f"{where}: is a {type(turn).__name__}; expected an object with role, content."
        )
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(
            f"{where}: needs text under role and content (or from and value); it has the keys "
            f"{sorted(map(str, turn))}."
        )
    if role not in ROLES:
        raise DataError(f"{where}: role {role!r} is unknown; use one of {', '.join(ROLES)}.")
    return Message(ROLES[role], content)
