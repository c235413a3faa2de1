"""What the model makes of one task: by kind, at every depth, item by item."""

from collections.abc import Sequence
from typing import Any, cast

from pretrain.errors import ConfigError
from pretrain.model.decoding import Exit
from pretrain.tasks.answers import find_answer, is_same
from pretrain.tasks.completions import Completion, complete, decoding
from pretrain.tasks.config import EvaluateOptions
from pretrain.tasks.likelihood import (
    Row,
    Subject,
    continuation_row,
    hits_of,
    nats_of,
    text_rows,
)
from pretrain.tasks.prompts import (
    Prompt,
    continuations,
    exact_continuation,
    is_equation,
    program_prompt,
    program_text,
    question_prompt,
)
from pretrain.tasks.records import Choice, Kind, Program, Question, Task, Text
from pretrain.tasks.sandbox import Verdict, check_confinement, run_program
from pretrain.tasks.scores import Outcome, Score, mean, ratio
from pretrain.tasks.sharing import share

WRITTEN = (Kind.generate, Kind.code)
"""Kinds for which the model writes text."""


def check_options(tasks: Sequence[Task], options: EvaluateOptions) -> None:
    """Raises ConfigError if the tasks need what is not allowed, or options do nothing for them."""
    programs = [task.name for task in tasks if task.kind is Kind.code]
    if programs and not options.run_code:
        raise ConfigError(
            f"Task {programs[0]} is judged by running what the model wrote, and nobody has read "
            "that. It runs confined (no network, files read only, limits of evaluate.code); allow "
            "it with evaluate.run_code=true, or leave the task out."
        )
    if options.run_code and not programs:
        raise ConfigError("evaluate.run_code=true would do nothing: no task is of kind code.")
    if options.exit is not Exit.none and not any(task.kind in WRITTEN for task in tasks):
        raise ConfigError(
            f"evaluate.exit={options.exit.value} would do nothing: no task is of kind "
            f"{' or '.join(kind.value for kind in WRITTEN)}, and likelihoods run to their depth."
        )
    if programs:
        check_confinement(options.code)


def measure(subject: Subject, task: Task, options: EvaluateOptions) -> Outcome:
    """Scores and records of every item; all ranks must call, and all get the same."""
    items = task.items
    match task.kind:
        case Kind.perplexity:
            scores, found = _perplexity(subject, task, cast("tuple[Text, ...]", items))
        case Kind.multiple_choice:
            scores, found = _choices(subject, task, cast("tuple[Choice, ...]", items))
        case Kind.exact:
            scores, found = _exact(subject, task, cast("tuple[Question, ...]", items))
        case Kind.generate:
            scores, found = _answers(subject, task, cast("tuple[Question, ...]", items), options)
        case Kind.code:
            scores, found = _programs(subject, task, cast("tuple[Program, ...]", items), options)
    return Outcome(task.name, task.kind, subject.depths, scores, found, task.total)


Found = tuple[dict[str, list[Score]], list[dict[str, Any]]]


def _perplexity(subject: Subject, task: Task, items: Sequence[Text]) -> Found:
    """Nats per token, per byte of UTF-8 and per word (what white space separates)."""
    windows = [text_rows(subject.tokenizer, item.text, subject.context) for item in items]
    nats = _regroup(nats_of(subject, [row for rows in windows for row in rows], task.name), windows)
    records: list[dict[str, Any]] = []
    for item, rows, of_rows in zip(items, windows, nats, strict=True):
        sums = [sum(of_row[at] for of_row in of_rows) for at in range(len(subject.depths))]
        records.append(
            {
                "id": item.id,
                "tokens": sum(row.scored for row in rows),
                "bytes": len(item.text.encode()),
                "words": len(item.text.split()),
                "nats": sums,
                "is_cut": False,
            }
        )
    scores = {
        f"nats_per_{unit.removesuffix('s')}": [
            ratio([r["nats"][at] for r in records], [r[unit] for r in records])
            for at in range(len(subject.depths))
        ]
        for unit in ("tokens", "bytes", "words")
    }
    return scores, records


def _choices(subject: Subject, task: Task, items: Sequence[Choice]) -> Found:
    """Accuracy of the likeliest choice, by the sum of nats, and by nats per character of it."""
    rows = [
        [continuation_row(subject.tokenizer, part, subject.context) for part in continuations(item)]
        for item in items
    ]
    nats = _regroup(nats_of(subject, [row for of_item in rows for row in of_item], task.name), rows)
    records: list[dict[str, Any]] = []
    for item, of_item, of_choices in zip(items, rows, nats, strict=True):
        by_depth = [list(values) for values in zip(*of_choices, strict=True)]
        sizes = [len(part.scored.strip()) for part in continuations(item)]
        chosen = [_least(values) for values in by_depth]
        per_size = [
            _least([nats / size for nats, size in zip(values, sizes, strict=True)])
            for values in by_depth
        ]
        records.append(
            {
                "id": item.id,
                "gold": item.gold,
                "nats": by_depth,
                "chosen": chosen,
                "chosen_normalized": per_size,
                "is_cut": any(row.is_cut for row in of_item),
            }
        )
    scores = {
        name: [
            mean([float(r[key][at] == r["gold"]) for r in records])
            for at in range(len(subject.depths))
        ]
        for name, key in (("accuracy", "chosen"), ("accuracy_normalized", "chosen_normalized"))
    }
    return scores, records


def _exact(subject: Subject, task: Task, items: Sequence[Question]) -> Found:
    """The share of answers of which every token is the likeliest, as greedy text would have it.

    Unlike written text, all depths take one pass.
    """
    parts = [exact_continuation(item) for item in items]
    rows = [continuation_row(subject.tokenizer, part, subject.context) for part in parts]
    records: list[dict[str, Any]] = [
        {
            "id": item.id,
            "answer": item.answer,
            "tokens": row.scored,
            "hits": list(hits),
            "is_right": [count == row.scored for count in hits],
            "is_cut": row.is_cut,
        }
        for item, row, hits in zip(items, rows, hits_of(subject, rows, task.name), strict=True)
    ]
    tokens = [r["tokens"] for r in records]
    by_depth = range(len(subject.depths))
    return {
        "exact_match": _share_of(records, "is_right", subject),
        "token_accuracy": [ratio([r["hits"][at] for r in records], tokens) for at in by_depth],
    }, records


def _answers(
    subject: Subject, task: Task, items: Sequence[Question], options: EvaluateOptions
) -> Found:
    """Exact match of final answers."""
    prompts = [question_prompt(item) for item in items]
    records: list[dict[str, Any]] = [
        {"id": i.id, "answer": i.answer, "found": [], "is_right": []} for i in items
    ]
    for depth in subject.depths:
        written = _write(subject, prompts, options, depth, f"{task.name} r={depth}")
        for item, record, completion in zip(items, records, written, strict=True):
            found = find_answer(completion.text, item.answer, at_once=is_equation(item))
            record["found"].append(found)
            record["is_right"].append(is_same(found, item.answer))
            _note(record, completion)
    return {"exact_match": _share_of(records, "is_right", subject)}, records


def _programs(
    subject: Subject, task: Task, items: Sequence[Program], options: EvaluateOptions
) -> Found:
    """The share of programs that pass their tests, each in a confined process."""
    prompts = [program_prompt(item) for item in items]
    records: list[dict[str, Any]] = [{"id": i.id, "is_passed": [], "why": []} for i in items]
    for depth in subject.depths:
        name = f"{task.name} r={depth}"
        written = _write(subject, prompts, options, depth, name)
        programs = [program_text(i, c.text) for i, c in zip(items, written, strict=True)]

        def judge(batch: list[int], programs: list[str] = programs) -> list[Verdict]:
            return [run_program(programs[index], options.code) for index in batch]

        verdicts = share(subject.world, name, [[i] for i in range(len(items))], judge)
        for record, completion, verdict in zip(records, written, verdicts, strict=True):
            record["is_passed"].append(verdict.is_passed)
            record["why"].append(verdict.why)
            _note(record, completion)
    return {"passed": _share_of(records, "is_passed", subject)}, records


def _write(
    subject: Subject, prompts: Sequence[Prompt], options: EvaluateOptions, depth: int, name: str
) -> list[Completion]:
    how = decoding(
        subject,
        depth,
        max_new_tokens=options.max_new_tokens,
        exit=options.exit,
        exit_threshold=options.exit_threshold,
    )
    return complete(subject, prompts, how, side_by_side=options.generate_rows, name=name)


def _note(record: dict[str, Any], completion: Completion) -> None:
    record.setdefault("text", []).append(completion.text)
    record.setdefault("tokens", []).append(completion.tokens)
    record.setdefault("steps", []).append(completion.steps)
    record["is_cut"] = completion.is_cut


def _share_of(records: Sequence[dict[str, Any]], key: str, subject: Subject) -> list[Score]:
    return [mean([float(r[key][at]) for r in records]) for at in range(len(subject.depths))]


def _least(values: Sequence[float]) -> int:
    return min(range(len(values)), key=values.__getitem__)


def _regroup(
    flat: Sequence[tuple[float, ...]], groups: Sequence[Sequence[Row]]
) -> list[list[tuple[float, ...]]]:
    """What was found for each row, by the item that the row is of."""
    rest = iter(flat)
    return [[next(rest) for _ in group] for group in groups]
