"""Sums to learn and to be asked: `a+b=c`, one a line, every number written from its lowest digit.

So 47 + 5 = 52 is the line 74+5=25. Written that way a sum can be worked out as it is written, digit
by digit with the carry (arXiv 2307.03381), and the place of a digit counts from the same end in all
three numbers. Each operand's length is drawn by itself. Text and items are pure functions of their
seeds.
"""

from collections.abc import Iterator
from typing import Any

from pretrain.data.arithmetic import Draw
from pretrain.data.config import DataConfig
from pretrain.data.documents import Document, Part, number_parts
from pretrain.errors import DataError

SOURCE = "addition"
PART_BYTES = 1 << 20


def find_parts(config: DataConfig) -> dict[str, list[Part]]:
    """The one source, in parts of about 1 MB that hold data.max_bytes together.

    Raises DataError if the configuration names another source.
    """
    if unknown := sorted(config.sources.keys() - {SOURCE}):
        raise DataError(
            f"data.sources names {', '.join(unknown)}; the corpus addition has only {SOURCE}."
        )
    assert config.max_bytes is not None, "checked by DataConfig"
    count = -(-config.max_bytes // PART_BYTES)
    sizes = {f"{number:05}": PART_BYTES for number in range(count)}
    return {SOURCE: number_parts(SOURCE, sizes, config.max_bytes)}


def read_documents(part: Part, config: DataConfig) -> Iterator[Document]:
    """Sums without end, each a document of one line."""
    assert config.max_digits is not None, "checked by DataConfig"
    draw, number = Draw(f"{SOURCE}/{config.max_digits}/{part.path}"), 0
    while True:
        a, b = (_number(draw, draw.integer(1, config.max_digits)) for _ in range(2))
        text = write_sum(a, b)
        yield Document(f"{SOURCE}/{part.path}#{number}", text)
        number += 1


def write_sum(a: int, b: int) -> str:
    """The line of a sum."""
    return f"{reverse(a)}+{reverse(b)}={reverse(a + b)}\n"


def reverse(number: int) -> str:
    """The digits of a number from the lowest on."""
    return str(number)[::-1]


def _number(draw: Draw, digits: int) -> int:
    """A positive number of so many digits; each is drawn, for one draw has only 53 bits."""
    number = draw.integer(1, 9)
    for _ in range(digits - 1):
        number = 10 * number + draw.integer(0, 9)
    return number


def items(digits: int, count: int, *, seed: int) -> list[dict[str, Any]]:
    """Records of a task file of kind `exact`: different sums of two numbers of so many digits.

    Their draws are not those of any training text; of up to two digits there are so few sums that
    training has seen them all. Raises DataError if there are fewer than `count`.
    """
    if count > (there := (9 * 10 ** (digits - 1)) ** 2):
        raise DataError(f"There are {there} sums of two numbers of {digits} digits, not {count}.")
    draw, found = Draw(f"{SOURCE}/items/{seed}/{digits}"), dict[str, str]()
    while len(found) < count:
        question, answer = write_sum(_number(draw, digits), _number(draw, digits)).split("=")
        found[f"{question}="] = answer
    return [
        {
            "task": f"{SOURCE}-{digits}",
            "kind": "exact",
            "id": f"{SOURCE}-{digits}/{number}",
            "question": question,
            "answer": answer,
        }
        for number, (question, answer) in enumerate(found.items())
    ]
