"""Worked arithmetic, generated: sums with their steps, chains, comparisons, word problems.

Every relation that is written down is true as Python reads it (`=` as `==`), which the tests
check. The text is a pure function of the seed: only `random.Random.random` is used, which Python
keeps the same between versions.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")

EXERCISES_PER_DOCUMENT = 12
NAMES = (
    "Ada",
    "Bela",
    "Chen",
    "Dana",
    "Emil",
    "Fatou",
    "Goro",
    "Hana",
    "Ivo",
    "Jun",
    "Kofi",
    "Lea",
)
THINGS = ("apples", "books", "coins", "marbles", "pencils", "seeds", "shells", "stamps", "tickets")
BOXES = ("bags", "baskets", "boxes", "crates", "drawers", "jars", "trays")


class Problem(NamedTuple):
    """A question in words, the steps that answer it, and the answer."""

    question: str
    steps: str
    answer: int


class Draw:
    """Choices from one seed."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed).random

    def integer(self, low: int, high: int) -> int:
        """A number from low to high, both included."""
        return low + int(self._random() * (high - low + 1))

    def number(self, most_digits: int) -> int:
        """A positive number of 1 to most_digits digits, each length as likely."""
        digits = self.integer(1, most_digits)
        return self.integer(10 ** (digits - 1), 10**digits - 1)

    def choice(self, items: Sequence[Item]) -> Item:
        """One of the items."""
        return items[self.integer(0, len(items) - 1)]


def documents(seed: str, characters: int) -> Iterator[str]:
    """Documents of worked exercises until they hold this many characters together."""
    draw = Draw(seed)
    while characters > 0:
        kinds = KINDS if draw.integer(0, 1) else (draw.choice(KINDS),)
        exercises = [draw.choice(kinds)(draw) for _ in range(EXERCISES_PER_DOCUMENT)]
        text = "\n\n".join(exercises) + "\n"
        characters -= len(text)
        yield text


def add(draw: Draw) -> str:
    """A sum, by places from the right with carries, or at once."""
    a, b = draw.number(6), draw.number(6)
    if draw.integer(0, 2) == 0:
        return f"{a} + {b} = {a + b}"
    lines, carry = [f"{a} + {b} = ?"], 0
    for place in range(max(len(str(a)), len(str(b)))):
        left, right = a // 10**place % 10, b // 10**place % 10
        total = left + right + carry
        carried = f" + {carry}" if carry else ""
        carry = total // 10
        lines.append(
            f"{left} + {right}{carried} = {total}, write {total % 10}"
            + (f", carry {carry}" if carry else "")
        )
    return "\n".join([*lines, f"{a} + {b} = {a + b}"])


def subtract(draw: Draw) -> str:
    """A difference, by the places of the number taken away, and its proof."""
    a, b = draw.number(6), draw.number(5)
    lines, left = [f"{a} - {b} = ?"], a
    for place in reversed(range(len(str(b)))):
        piece = b // 10**place % 10 * 10**place
        if piece:
            lines.append(f"{left} - {piece} = {left - piece}")
            left -= piece
    return "\n".join([*lines, f"{a} - {b} = {a - b}, and {a - b} + {b} = {a}"])


def multiply(draw: Draw) -> str:
    """A product, by the places of the second factor."""
    a, b = draw.number(4), draw.number(3)
    lines, pieces = [f"{a} * {b} = ?"], []
    for place in reversed(range(len(str(b)))):
        piece = b // 10**place % 10 * 10**place
        if piece:
            lines.append(f"{a} * {piece} = {a * piece}")
            pieces.append(str(a * piece))
    if len(pieces) > 1:
        lines.append(f"{' + '.join(pieces)} = {a * b}")
    return "\n".join([*lines, f"{a} * {b} = {a * b}"])


def divide(draw: Draw) -> str:
    """Quotient and remainder, with the proof."""
    a, b = draw.number(5), draw.number(2)
    quotient, remainder = divmod(a, b)
    return (
        f"{a} // {b} = {quotient} and {a} % {b} = {remainder}, "
        f"because {b} * {quotient} = {b * quotient} and {a} - {b * quotient} = {remainder}"
    )


def chain(draw: Draw) -> str:
    """Several operations from the left, one step a line."""
    value = draw.number(2)
    expression = str(value)
    lines: list[str] = []
    for _ in range(draw.integer(2, 5)):
        symbol, right, result = _operation(draw, value)
        expression = f"({expression}) {symbol} {right}" if lines else f"{value} {symbol} {right}"
        lines.append(f"{value} {symbol} {right} = {result}")
        value = result
    steps = "\n".join(f"Step {i + 1}: {line}" for i, line in enumerate(lines))
    return f"Work out {expression}.\n{steps}\nAnswer: {expression} = {value}"


def _operation(draw: Draw, value: int) -> tuple[str, int, int]:
    symbol = draw.choice(("+", "-", "*") if abs(value) < 1000 else ("+", "-", "//", "%"))
    right = draw.number(1) if symbol in ("*", "//", "%") else draw.number(3)
    results = {"+": value + right, "-": value - right, "*": value * right}
    results |= {"//": value // right, "%": value % right}
    return symbol, right, results[symbol]


def reduce(draw: Draw) -> str:
    """One expression, simplified from equation to equation on one line."""
    a, b, c, d = (draw.number(2) for _ in range(4))
    if draw.integer(0, 1):
        return f"{a} * {b} + {c} * {d} = {a * b} + {c * d} = {a * b + c * d}"
    return (
        f"({a} + {b}) * {c} - {d} = {a + b} * {c} - {d} = {(a + b) * c} - {d} = {(a + b) * c - d}"
    )


def compare(draw: Draw) -> str:
    """Which of two expressions is larger, and why."""
    a, b, c = draw.number(2), draw.number(2), draw.number(3)
    left, right = a * b, c + a
    relation = "<" if left < right else ">" if left > right else "="
    return (
        f"Compare {a} * {b} with {c} + {a}.\n{a} * {b} = {left}\n{c} + {a} = {right}\n"
        f"{left} {relation} {right}, so {a} * {b} {relation} {c} + {a}"
    )


def sequence(draw: Draw) -> str:
    """A sequence that adds or multiplies, its rule, and the next terms."""
    is_sum, step = draw.integer(0, 3) > 0, draw.number(2)
    symbol, step = ("+", step) if is_sum else ("*", draw.integer(2, 5))
    terms = [draw.number(2)]
    for _ in range(draw.integer(4, 6)):
        terms.append(terms[-1] + step if is_sum else terms[-1] * step)
    shown = ", ".join(map(str, terms[:-2]))
    rule = f"each term is the one before {'plus' if is_sum else 'times'} {step}"
    steps = "\n".join(
        f"{a} {symbol} {step} = {b}" for a, b in zip(terms[-3:], terms[-2:], strict=False)
    )
    return f"Continue {shown}: {rule}.\n{steps}\nAnswer: {terms[-2]}, {terms[-1]}"


def story(draw: Draw) -> str:
    """A word problem with its steps."""
    problem = word_problem(draw)
    return f"Question: {problem.question}\n{problem.steps}\nAnswer: {problem.answer}"


def word_problem(draw: Draw) -> Problem:
    """One problem in words."""
    return draw.choice((_collect, _share, _buy, _travel))(draw)


def _collect(draw: Draw) -> Problem:
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    start, found = draw.number(3), draw.number(3)
    given = draw.integer(1, start + found)
    total, left = start + found, start + found - given
    question = (
        f"{name} has {start} {thing}, finds {found} more and gives {given} away. "
        f"How many {thing} are left?"
    )
    return Problem(question, f"{start} + {found} = {total}\n{total} - {given} = {left}", left)


def _share(draw: Draw) -> Problem:
    name, thing, box = draw.choice(NAMES), draw.choice(THINGS), draw.choice(BOXES)
    boxes, each, friends = draw.number(2), draw.number(2), draw.integer(2, 9)
    total = boxes * each
    question = (
        f"{name} has {boxes} {box} of {each} {thing} each and shares them fairly among {friends} "
        f"friends. How many does each friend get, as a whole number?"
    )
    steps = f"{boxes} * {each} = {total}\n{total} // {friends} = {total // friends}"
    if total % friends:
        steps += f", and {total} % {friends} = {total % friends} are left over"
    return Problem(question, steps, total // friends)


def _buy(draw: Draw) -> Problem:
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    count, price = draw.integer(2, 30), draw.integer(2, 60)
    cost = count * price
    paid = cost + draw.integer(0, 100)
    question = (
        f"{name} buys {count} {thing} at {price} cents each and pays with {paid} cents. "
        "How many cents come back?"
    )
    return Problem(
        question, f"{count} * {price} = {cost}\n{paid} - {cost} = {paid - cost}", paid - cost
    )


def _travel(draw: Draw) -> Problem:
    name, speed = draw.choice(NAMES), draw.integer(3, 120)
    first, second = draw.integer(1, 9), draw.integer(1, 9)
    hours, distance = first + second, speed * (first + second)
    question = (
        f"{name} travels {speed} km every hour, for {first} hours before noon and {second} after. "
        "How many km is that?"
    )
    return Problem(
        question, f"{first} + {second} = {hours}\n{speed} * {hours} = {distance}", distance
    )


KINDS: tuple[Callable[[Draw], str], ...] = (
    add, subtract, multiply, divide, chain, reduce, compare, sequence, story,
)  # fmt: skip
"""The kinds of exercise."""
