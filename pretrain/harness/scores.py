"""How lm-evaluation-harness scores our items: as `pretrain evaluate` does, item by item.

The tasks that `pretrain harness tasks` writes name these functions. Each gets a record of
`pretrain.harness.tasks` and what the model made of its requests, and gives numbers by metric.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from pretrain.tasks.answers import find_answer, is_same
from pretrain.tasks.config import CodeLimits
from pretrain.tasks.prompts import cut, program_text
from pretrain.tasks.records import Program
from pretrain.tasks.sandbox import check_confinement, run_program


def choices(record: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Whether the likeliest choice is right, by its likelihood and by that per character of it."""
    scored = record["scored"]
    sizes = [len(text.strip()) for text in scored] if isinstance(scored, list) else None
    sums = [likelihood for likelihood, _ in results]
    per_size = [each / size for each, size in zip(sums, sizes, strict=True)] if sizes else sums
    return {
        "acc": float(_largest(sums) == record["gold"]),
        "acc_norm": float(_largest(per_size) == record["gold"]),
    }


def perplexity(record: Mapping[str, Any], results: Sequence[float]) -> dict[str, tuple[float, int]]:
    """The likelihood of a text, and how many words and bytes of UTF-8 it has."""
    (likelihood,), text = results, record["text"]
    by_byte = (likelihood, len(text.encode()))
    return {
        "word_perplexity": (likelihood, len(text.split())),
        "byte_perplexity": by_byte,
        "bits_per_byte": by_byte,
    }


def answers(record: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the final answer is the right one."""
    text = _ended(record, results)
    found = find_answer(text, record["answer"], at_once=record["at_once"])
    return {"exact_match": float(is_same(found, record["answer"]))}


def programs(record: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the program passes its test, run confined with the limits that are the default.

    Raises ConfigError where programs cannot be confined.
    """
    limits = _checked_limits()
    item = Program(**{name: record[name] for name in ("id", "test", "entry_point", "solution")},
                   prompt=record["item_prompt"])  # fmt: skip
    program = program_text(item, _ended(record, results))
    return {"passed": float(run_program(program, limits).is_passed)}


@cache
def _checked_limits() -> CodeLimits:
    limits = CodeLimits()
    check_confinement(limits)
    return limits


def _ended(record: Mapping[str, Any], results: Sequence[str]) -> str:
    """What counts of a text; a blank beginning has no end, which `until` cannot say."""
    before = cut(results[0], tuple(record["ends"]))
    return results[0] if before is None else before


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
