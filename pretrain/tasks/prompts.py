"""How items are put to the model, and where what it writes ends."""

import re
from typing import NamedTuple

from pretrain.tasks.records import Choice, Program, Question

# Stands by itself; __ or x_1 are no blanks.
_BLANK = re.compile(r"(?<!\w)_(?!\w)")

# A model that goes on after its answer asks itself the next question.
_NEXT_QUESTION = ("\nQuestion:",)
_NEXT_LINE = ("\n",)
# What follows a function at the margin is no part of it.
_AFTER_BODY = ("\ndef ", "\nclass ", "\nif ", "\nprint", "\nassert", "\n#", "\n@", '\n"""', "\n```")
_AFTER_FUNCTIONS = ("\nif ", "\nprint", "\nassert", '\n"""', "\n```")


class Continuation(NamedTuple):
    """A beginning, and the text behind it whose likelihood counts."""

    given: str
    scored: str


class Prompt(NamedTuple):
    """What the model continues, until one of `ends`."""

    text: str
    ends: tuple[str, ...]
    counts_blank: bool = False
    """Whether an end counts that comes before the first word too."""


def continuations(item: Choice) -> list[Continuation]:
    """One for each choice.

    A context without a question is continued; a blank (`_` by itself) in the question is filled in
    and the rest of the sentence scored, which every choice has in common (arXiv 1806.02847).
    """
    blanks = list(_BLANK.finditer(item.question))
    if len(blanks) == 1:
        before = item.context + "\n" if item.context else ""
        left, right = item.question[: blanks[0].start()], item.question[blanks[0].end() :]
        return [_fill(before + left, choice, right) for choice in item.choices]
    if not item.question:
        return [Continuation(item.context.rstrip(), " " + choice) for choice in item.choices]
    given = f"{item.context}\n" if item.context else ""
    given += f"Question: {item.question}\nAnswer:"
    return [Continuation(given, " " + choice) for choice in item.choices]


def _fill(left: str, choice: str, right: str) -> Continuation:
    if re.search(r"\w", right):
        return Continuation(left + choice, right)
    # a sentence that ends with its blank has nothing else to score
    given = left.rstrip()
    return Continuation(given, left[len(given) :] + choice + right)


def question_prompt(item: Question) -> Prompt:
    """A question that ends in `=`, or says itself how to answer, is asked as it stands."""
    if is_equation(item):
        return Prompt(item.question, _NEXT_LINE)
    if "Answer:" in item.question:
        return Prompt(item.question, _NEXT_QUESTION)
    return Prompt(f"Question: {item.question}\nAnswer:", _NEXT_QUESTION)


def exact_continuation(item: Question) -> Continuation:
    """Question and answer as they stand, of which the answer counts."""
    return Continuation(item.question, item.answer)


def is_equation(item: Question) -> bool:
    """Whether the answer follows at once."""
    return item.question.rstrip().endswith("=")


def program_prompt(item: Program) -> Prompt:
    """A function that has begun is continued; a task in words becomes a docstring with its test."""
    if _has_begun(item):
        return Prompt(item.prompt, _AFTER_BODY)
    return Prompt(f'"""\n{item.prompt}\n{item.test}\n"""\n', _AFTER_FUNCTIONS)


def program_text(item: Program, completion: str) -> str:
    """What is run to judge a completion: it raises unless the completion is right."""
    if _has_begun(item):
        call = f"check({item.entry_point})"
        return f"{item.prompt}{completion}\n\n{item.test}\n\n{call}\n"
    return f"{completion}\n\n{item.test}\n"


def _has_begun(item: Program) -> bool:
    return f"def {item.entry_point}(" in item.prompt


def cut(text: str, ends: tuple[str, ...], *, counts_blank: bool = False) -> str | None:
    """What stands before the first of the ends; None if there is none.

    A blank beginning has none, unless it counts: a model may go to a new line before it answers.
    """
    start = 0
    if not counts_blank:
        blank = len(text) - len(text.lstrip())
        # the newline that precedes the text's first word may begin an end
        start = max(blank - 1, 0) if any(end.strip() for end in ends) else blank
    found = [at for end in ends if (at := text.find(end, start)) >= 0]
    return text[: min(found)] if found else None
