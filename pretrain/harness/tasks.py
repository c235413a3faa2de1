"""The command `pretrain harness tasks`: files of items as tasks of lm-evaluation-harness.

A task is a NAME.yaml beside its records, NAME.jsonl. What is asked is what `pretrain evaluate`
asks, word by word (`pretrain.tasks.prompts`), and it is scored alike (`pretrain.harness.scores`).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml

from pretrain.config import HarnessConfig
from pretrain.errors import DataError
from pretrain.tasks.prompts import (
    Prompt,
    continuations,
    is_equation,
    program_prompt,
    question_prompt,
)
from pretrain.tasks.records import Choice, Kind, Program, Question, Task, Text, read_task

# So that no task of lm-evaluation-harness's own has the same name.
PREFIX = "pretrain_"
# Of how items are put and scored; it stands beside every score.
VERSION = 1
Record = dict[str, Any]


class Part(NamedTuple):
    """One task of lm-evaluation-harness: its records, and the settings that its kind needs."""

    records: list[Record]
    settings: dict[str, Any]
    scores: str
    """The function of `pretrain.harness.scores`."""
    suffix: str = ""
    """What tells it from the other part of the same file."""


def main(config: HarnessConfig) -> None:
    """Write the folder, and say how to use it. Raises DataError for files that are no tasks."""
    options, folder = config.harness, Path(config.harness.to)
    tasks = [read_task(path, options.items) for path in options.tasks]
    folder.mkdir(parents=True, exist_ok=True)
    names = [write(task, folder, max_new_tokens=options.max_new_tokens) for task in tasks]
    unsafe = "--confirm_run_unsafe_code " if any(t.kind is Kind.code for t in tasks) else ""
    print(
        f"written: {folder} ({', '.join(names)})\n"
        f"next: pretrain harness run --model recurrent --model_args run_dir=FOLDER,num_steps=32 "
        f"{unsafe}--batch_size auto --include_path {folder} --tasks {','.join(names)}"
    )


def write(task: Task, folder: Path, *, max_new_tokens: int) -> str:
    """Write one file's task, or two and a group of them; the name to ask for."""
    name = PREFIX + task.name
    parts = _parts(task, max_new_tokens)
    for part in parts:
        _write_part(part, folder, name + part.suffix)
    if len(parts) > 1:
        metrics = [metric["metric"] for metric in parts[0].settings["metric_list"]]
        group = {
            "group": name,
            "task": [name + part.suffix for part in parts],
            "aggregate_metric_list": [
                {"metric": metric, "aggregation": "mean", "weight_by_size": True}
                for metric in metrics
            ],
        }
        (folder / f"{name}.yaml").write_text(_yaml(group), encoding="utf-8")
    return name


def _write_part(part: Part, folder: Path, name: str) -> None:
    records = folder / f"{name}.jsonl"
    lines = [json.dumps(record, ensure_ascii=False) for record in part.records]
    records.write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {
        "task": name,
        # a relative path would be looked for where the harness is started
        "dataset_kwargs": {"records": str(records.resolve())},
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": VERSION},
        **part.settings,
    }
    # the tag is no plain YAML, so these are added to what is
    functions = (
        "custom_dataset: !function pretrain.harness.items.load\n"
        f"process_results: !function pretrain.harness.scores.{part.scores}\n"
    )
    (folder / f"{name}.yaml").write_text(_yaml(settings) + functions, encoding="utf-8")


def _yaml(settings: dict[str, Any]) -> str:
    return str(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def _parts(task: Task, max_new_tokens: int) -> list[Part]:
    items = task.items
    match task.kind:
        case Kind.perplexity:
            return [_texts(cast("tuple[Text, ...]", items))]
        case Kind.multiple_choice:
            return _choices(cast("tuple[Choice, ...]", items))
        case Kind.exact:
            raise DataError(
                f"{task.name} has items of kind 'exact', which only `pretrain evaluate` measures; "
                "with kind 'generate' lm-evaluation-harness can ask the same questions."
            )
        case Kind.generate:
            questions = cast("tuple[Question, ...]", items)
            prompts = [question_prompt(item) for item in questions]
            records = [
                {"id": item.id, "answer": item.answer, "at_once": is_equation(item)}
                for item in questions
            ]
            return [_written("answers", "exact_match", records, prompts, max_new_tokens)]
        case Kind.code:
            programs = cast("tuple[Program, ...]", items)
            prompts = [program_prompt(item) for item in programs]
            records = [
                {"id": item.id, "item_prompt": item.prompt, "test": item.test,
                 "entry_point": item.entry_point, "solution": item.solution}
                for item in programs
            ]  # fmt: skip
            part = _written("programs", "passed", records, prompts, max_new_tokens)
            return [part._replace(settings=part.settings | {"unsafe_code": True})]


def _texts(items: Sequence[Text]) -> Part:
    metrics = {"word_perplexity": "weighted_perplexity", "byte_perplexity": "weighted_perplexity"}
    settings = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": _metrics(
            metrics | {"bits_per_byte": "bits_per_byte"}, higher_is_better=False
        ),
    }
    return Part([{"id": item.id, "text": item.text} for item in items], settings, "perplexity")


def _choices(items: Sequence[Choice]) -> list[Part]:
    """Choices behind one beginning, and beginnings with one end, are two kinds of task there."""
    behind: list[Record] = []
    before: list[Record] = []
    for item in items:
        parts = continuations(item)
        given = [part.given for part in parts]
        scored = [part.scored for part in parts]
        if len(set(given)) == 1:
            behind.append({"id": item.id, "given": given[0], "scored": scored, "gold": item.gold})
        else:
            assert len(set(scored)) == 1, item
            before.append({"id": item.id, "given": given, "scored": scored[0], "gold": item.gold})
    settings = {
        "output_type": "multiple_choice",
        # the blank between them is part of what is scored
        "target_delimiter": "",
        "metric_list": _metrics({"acc": "mean", "acc_norm": "mean"}),
    }
    fields = {"doc_to_text": "given", "doc_to_target": "gold", "doc_to_choice": "scored"}
    # a text that is a number says there that choices are the beginnings
    filled = {"doc_to_text": "gold", "doc_to_target": "scored", "doc_to_choice": "given"}
    found = [
        Part(behind, settings | fields, "choices", "_continued"),
        Part(before, settings | filled, "choices", "_filled"),
    ]
    found = [part for part in found if part.records]
    return found if len(found) > 1 else [found[0]._replace(suffix="")]


def _written(
    scores: str,
    metric: str,
    records: Sequence[Record],
    prompts: Sequence[Prompt],
    max_new_tokens: int,
) -> Part:
    """Text that the model writes: it ends early where that is sure to change no score.

    An end that is blank is left to the scores, because here it counts behind the first word only.
    """
    common = [
        end for end in prompts[0].ends
        if end.strip() and all(end in prompt.ends for prompt in prompts)
    ]  # fmt: skip
    settings = {
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "answer" if metric == "exact_match" else "solution",
        "generation_kwargs": {
            "until": common,
            "max_gen_toks": max_new_tokens,
            "do_sample": False,
        },
        "metric_list": _metrics({metric: "mean"}),
    }
    found = [
        record | {"prompt": prompt.text, "ends": list(prompt.ends)}
        for record, prompt in zip(records, prompts, strict=True)
    ]
    return Part(found, settings, scores)


def _metrics(aggregations: dict[str, str], *, higher_is_better: bool = True) -> list[Record]:
    return [
        {"metric": name, "aggregation": how, "higher_is_better": higher_is_better}
        for name, how in aggregations.items()
    ]
