"""Generated arithmetic: every relation that is written down is true, and the seed decides all."""

import re
from collections import Counter

import pytest

from pretrain.data.arithmetic import KINDS, Draw, documents, word_problem

# Runs of numbers, operators and relations; words and commas end them.
RELATION = re.compile(r"[-(\d][-+*/%()\d <>=]*[<>=][-+*/%()\d <>=]*[\d)]")


def relations(text: str) -> list[str]:
    return RELATION.findall(text)


def is_true(relation: str) -> bool:
    """Whether each term of `a = b < c` stands so to the next, evaluated by Python."""
    return bool(eval(relation.replace("=", "==")))


def test_every_relation_is_true() -> None:
    count = 0
    for text in documents("test", 300_000):
        for relation in relations(text):
            assert is_true(relation), relation
            count += 1
    # About one relation for 20 characters; a broken pattern would find few.
    assert count > 10_000


def test_the_check_sees_a_false_relation() -> None:
    assert relations("so 12 + 5 = 17, and (3 + 4) * 2 = 7 * 2 = 14.") == [
        "12 + 5 = 17",
        "(3 + 4) * 2 = 7 * 2 = 14",
    ]
    text = next(documents("test", 1000))
    for relation in relations(text):
        wrong = relation[:-1] + str((int(relation[-1]) + 1) % 10)
        if "<" not in wrong and ">" not in wrong:
            assert not is_true(wrong), wrong


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_exercise_has_relations_and_variety(kind) -> None:  # type: ignore[no-untyped-def]
    draw = Draw(kind.__name__)
    texts = [kind(draw) for _ in range(300)]
    assert all(relations(text) for text in texts)
    assert len(set(texts)) > 250


def test_word_problems_end_in_their_answer() -> None:
    draw = Draw("words")
    for _ in range(500):
        problem = word_problem(draw)
        results = [int(relation.rsplit("= ", 1)[1]) for relation in relations(problem.steps)]
        assert problem.answer in results[-2:]
        given = set(re.findall(r"\d+", problem.question))
        first = re.findall(r"\d+", problem.steps)[:2]
        assert given.issuperset(first), (problem.question, problem.steps)


def test_every_operation_and_relation_occurs() -> None:
    seen = Counter(re.findall(r"//|[-+*%<>=]", "".join(documents("test", 100_000))))
    assert all(seen[symbol] > 50 for symbol in ("+", "-", "*", "//", "%", "<", ">", "="))


def test_the_seed_decides_the_text() -> None:
    assert list(documents("a", 20_000)) == list(documents("a", 20_000))
    assert list(documents("a", 20_000)) != list(documents("b", 20_000))
    # Held across Python versions: only random.random is used.
    assert next(documents("fixed", 1)).splitlines()[0] == EXPECTED_LINE


def test_documents_reach_the_length_that_was_asked_for() -> None:
    lengths = [len(text) for text in documents("a", 20_000)]
    assert sum(lengths) >= 20_000 > sum(lengths[:-1])


def test_draws_cover_their_range_evenly() -> None:
    draw = Draw("range")
    counts = Counter(draw.integer(-2, 2) for _ in range(5000))
    assert sorted(counts) == [-2, -1, 0, 1, 2]
    # 1000 each; binomial deviation 28, so 150 is more than five of them.
    assert all(abs(count - 1000) < 150 for count in counts.values())
    digits = Counter(len(str(draw.number(3))) for _ in range(3000))
    assert all(abs(digits[n] - 1000) < 150 for n in (1, 2, 3))


EXPECTED_LINE = "Work out ((((77 + 8) - 9) - 26) + 5) * 7."
