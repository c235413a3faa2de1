"""What text is before it is tokens: documents, and the parts of a corpus that hold them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from pretrain.data.chat import Message


class Document(NamedTuple):
    """One text, or one chat.

    `id` is "<source>/<path below the root>#<record number from 0>", the same on every machine.
    `text` of a chat is what was said, without roles; `messages` is None for plain text.
    """

    id: str
    text: str
    messages: tuple[Message, ...] | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """A unit of parallel work: one file, or one batch of the embedded corpus's files.

    `index` numbers a source's parts from 0. `max_bytes` is the part's share of data.max_bytes:
    it ends with the first document that reaches it. `stored_bytes` is the size of its files.
    `is_held_out`: none of its documents is for training, whatever their ids.
    """

    source: str
    path: str
    index: int
    max_bytes: int | None = None
    stored_bytes: int = 0
    is_held_out: bool = False


def number_parts(source: str, sizes: dict[str, int], max_bytes: int | None) -> list[Part]:
    """A source's parts in the order of their paths, which share max_bytes by their size."""
    total = sum(sizes.values())
    parts = []
    for index, path in enumerate(sorted(sizes)):
        # Rounded up, so that a share is never zero and the shares never fall short.
        share = None if max_bytes is None else -(-max_bytes * sizes[path] // max(total, 1))
        parts.append(Part(source, path, index, share, sizes[path]))
    return parts


def cut_at_blank_lines(text: str, characters: int) -> Iterator[str]:
    """The text in pieces of at most this many characters, which joined give it back.

    A piece ends after a blank line where there is one, else after a line, else anywhere.
    """
    start = 0
    while len(text) - start > characters:
        end = start + characters
        blank_line = text.rfind("\n\n", start, end)
        line = text.rfind("\n", start, end)
        if blank_line >= 0:
            end = blank_line + 2
        elif line >= 0:
            end = line + 1
        yield text[start:end]
        start = end
    yield text[start:]
