"""Sums to learn and to be asked: `a+b=c`, one a line.

Order `lowest`: every number is written from its lowest digit on, 47 + 5 = 52 as 74+5=25. Such a sum
can be worked out as it is written, digit by digit with the carry (arXiv 2307.03381), so it asks for
little thought. Order `highest`: numbers are written as usual, all as wide as the sum may be, 47 + 5
as 047+005=052. Its first digit already hangs on every carry; in half of these sums most places add
up to 9, so that carries run far. In both orders a place counts from the same end in all three
numbers. Text and items are pure functions of their seeds.
"""

from collections.abc import Iterator
from typing import Any

from pretrain.data.arithmetic import Draw
from pretrain.data.config import DataConfig, DigitOrder
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
    """Sums without end, each a document of one line; each operand's length is drawn by itself."""
    assert config.max_digits is not None, "checked by DataConfig"
    order, number = config.digit_order, 0
    draw = Draw(f"{SOURCE}/{order.value}/{config.max_digits}/{part.path}")
    while True:
        lengths = (draw.integer(1, config.max_digits), draw.integer(1, config.max_digits))
        yield Document(f"{SOURCE}/{part.path}#{number}", _draw_sum(draw, lengths, order))
        number += 1


def _draw_sum(draw: Draw, lengths: tuple[int, int], order: DigitOrder) -> str:
    a, b = (_number(draw, digits) for digits in lengths)
    if order is DigitOrder.highest and draw.integer(0, 1):
        b = _fill_to_nines(draw, a, b)
    return write_sum(a, b, order)


def _fill_to_nines(draw: Draw, a: int, b: int) -> int:
    """b, of whose places below the highest three in four are what a lacks to 9."""
    for place in range(len(str(b)) - 1):
        unit = 10**place
        if draw.integer(0, 3):
            b += (9 - a // unit % 10 - b // unit % 10) * unit
    return b


def write_sum(a: int, b: int, order: DigitOrder) -> str:
    """The line of a sum."""
    if order is DigitOrder.lowest:
        return f"{reverse(a)}+{reverse(b)}={reverse(a + b)}\n"
    width = max(len(str(a)), len(str(b))) + 1
    return f"{a:0{width}}+{b:0{width}}={a + b:0{width}}\n"


def reverse(number: int) -> str:
    """The digits of a number from the lowest on."""
    return str(number)[::-1]


def _number(draw: Draw, digits: int) -> int:
    """A positive number of so many digits; each is drawn, for one draw has only 53 bits."""
    number = draw.integer(1, 9)
    for _ in range(digits - 1):
        number = 10 * number + draw.integer(0, 9)
    return number


def items(
    digits: int, count: int, *, seed: int, order: DigitOrder = DigitOrder.lowest
) -> list[dict[str, Any]]:
    """Records of a task file of kind `exact`: different sums of two numbers of so many digits.

    Their draws are not those of any training text; of up to two digits there are so few sums that
    training has seen them all. Raises DataError if there are fewer than `count`.
    """
    if count > (there := (9 * 10 ** (digits - 1)) ** 2):
        raise DataError(f"There are {there} sums of two numbers of {digits} digits, not {count}.")
    draw, found = Draw(f"{SOURCE}/items/{order.value}/{seed}/{digits}"), dict[str, str]()
    while len(found) < count:
        question, answer = _draw_sum(draw, (digits, digits), order).split("=")
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
