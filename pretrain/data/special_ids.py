"""Where special tokens live: the top 32 ids of every vocabulary that we train.

Layout and names are the published tokenizer's (arXiv 2502.05171): for 65,536 pieces begin_text
is 65504, end_text 65505, begin_header 65506, end_header 65507, end_turn 65508, pad 65509.
"""

from typing import NamedTuple

RESERVED = 32
"""Ids at the top of the range that no text encodes to."""


class SpecialIds(NamedTuple):
    """Ids that frame documents and turns; their order is their order in our own vocabularies.

    A tokenizer that was adopted from elsewhere may have none for turns.
    """

    begin_text: int
    end_text: int
    begin_header: int | None
    end_header: int | None
    end_turn: int | None
    pad: int

    def known(self) -> dict[str, int]:
        """The ids that there are, by name."""
        return {name: i for name, i in self._asdict().items() if i is not None}

    def stops(self) -> list[int]:
        """Ids after which the model has said all."""
        return [i for i in (self.end_text, self.end_turn) if i is not None]


def special_ids(vocabulary_size: int) -> SpecialIds:
    """The ids of the named special tokens in a vocabulary of ours of this size."""
    first = vocabulary_size - RESERVED
    return SpecialIds(*range(first, first + len(SpecialIds._fields)))


def special_name(field: str) -> str:
    """How the published tokenizer spells a special token."""
    return f"<|{field}|>"


def special_names() -> list[str]:
    """The 32 pieces at the top of the range, in the order of their ids."""
    named = [special_name(field) for field in SpecialIds._fields]
    return named + [f"<|reserved_{i}|>" for i in range(RESERVED - len(named))]
