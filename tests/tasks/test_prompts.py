"""Items are put to the model in full, and what it writes ends where it should."""

import pytest

from pretrain.tasks.prompts import (
    Continuation,
    continuations,
    cut,
    program_prompt,
    program_text,
    question_prompt,
)
from pretrain.tasks.records import Choice, Program, Question


def choice(context: str = "", question: str = "") -> Choice:
    return Choice(id="1", context=context, question=question, choices=("Ann", "Bo"), gold=0)


@pytest.mark.parametrize(
    ("item", "first"),
    [
        (choice("He saw "), Continuation("He saw", " Ann")),
        (choice("", "Who?"), Continuation("Question: Who?\nAnswer:", " Ann")),
        (choice("Rain.", "Who?"), Continuation("Rain.\nQuestion: Who?\nAnswer:", " Ann")),
        (choice("", "So _ left early."), Continuation("So Ann", " left early.")),
        (choice("Rain.", "So _ left."), Continuation("Rain.\nSo Ann", " left.")),
        # nothing but a full stop behind the blank: the choice itself is scored
        (choice("", "It was _."), Continuation("It was", " Ann.")),
        (choice("", "_"), Continuation("", "Ann")),
        # names with _ and lines to write on are no blanks
        (choice("", "x_1 or __?"), Continuation("Question: x_1 or __?\nAnswer:", " Ann")),
    ],
)
def test_choices_continue_what_is_given(item: Choice, first: Continuation) -> None:
    found = continuations(item)
    assert found[0] == first
    assert found[1].given + found[1].scored == (first.given + first.scored).replace("Ann", "Bo")


def test_questions_are_framed_unless_they_say_how_to_answer() -> None:
    texts = [
        question_prompt(Question(id="1", question=question, answer="1")).text
        for question in ("1+1=", "How many?", "How many? End with: Answer:")
    ]
    assert texts == ["1+1=", "Question: How many?\nAnswer:", "How many? End with: Answer:"]


def test_programs_are_the_function_and_its_test() -> None:
    begun = Program(
        id="1", prompt="def f():\n", test="def check(g): g()", entry_point="f", solution=""
    )
    told = Program(id="2", prompt="Do it.", test="assert f()", entry_point="f", solution="")
    assert (
        program_text(begun, "    pass") == "def f():\n    pass\n\ndef check(g): g()\n\ncheck(f)\n"
    )
    assert program_text(told, "def f(): pass") == "def f(): pass\n\nassert f()\n"
    assert program_prompt(told).text == '"""\nDo it.\nassert f()\n"""\n'


@pytest.mark.parametrize(
    ("text", "ends", "before"),
    [
        (" 734\n735", ("\n",), " 734"),
        ("\n\n734\n735", ("\n",), "\n\n734"),
        ("\n \n", ("\n",), None),
        (" 7", ("\n",), None),
        (" 7\nQuestion: and", ("\nQuestion:",), " 7"),
        ("\nQuestion: and", ("\nQuestion:",), ""),
        ("    return 1\n\nprint(1)\ndef g", ("\ndef ", "\nprint"), "    return 1\n"),
    ],
)
def test_texts_end_at_the_first_end(text: str, ends: tuple[str, ...], before: str | None) -> None:
    assert cut(text, ends) == before
