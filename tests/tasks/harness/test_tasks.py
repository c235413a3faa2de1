"""Written as tasks of lm-evaluation-harness, items are asked and scored as `evaluate` does."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conftest import run_cli
from pretrain.compose import load
from pretrain.data.tokenizer import Tokenizer
from pretrain.engine.world import World
from pretrain.errors import ConfigError, DataError
from pretrain.harness import scores
from pretrain.harness.tasks import main
from pretrain.loop.trained import load_trained
from pretrain.tasks.config import EvaluateOptions
from pretrain.tasks.likelihood import Subject
from pretrain.tasks.measure import measure
from pretrain.tasks.records import read_task
from pretrain.tasks.scores import Outcome

Write = Callable[[str, list[dict[str, Any]]], Path]


class Loader(yaml.SafeLoader):
    """Reads the name of a function as text."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def written(
    folder: Path, *files: Path, **options: Any
) -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
    """By name, the settings and records of what the command writes for these files."""
    words = [f"harness.{name}={value}" for name, value in options.items()]
    tasks = f"harness.tasks=[{','.join(map(str, files))}]"
    main(load("harness", [tasks, f"harness.to={folder}", *words]))
    found = {}
    for path in folder.glob("*.yaml"):
        records = path.with_suffix(".jsonl")
        lines = records.read_text().removesuffix("\n").split("\n") if records.is_file() else []
        settings = yaml.load(path.read_text(), Loader)
        found[path.stem] = (settings, [json.loads(line) for line in lines])
    return found


@pytest.fixture(scope="module")
def outcomes(run_dir: Path, task_files: dict[str, Path]) -> dict[str, Outcome]:
    trained = load_trained(run_dir, torch.device("cpu"), dtype=torch.float32)
    subject = Subject(
        model=trained.model,
        tokenizer=Tokenizer.load(trained.config.tokenizer.path),
        world=World(0, 1, 0, torch.device("cpu")),
        depths=(2,),
        batch_tokens=256,
    )
    options = EvaluateOptions(depths=[2], rows=1, max_new_tokens=4)
    names = ("birds", "endings", "sums")
    return {name: measure(subject, read_task(task_files[name]), options) for name in names}


def test_choices_are_asked_in_two_tasks_where_they_are_of_two_kinds(
    tmp_path: Path, task_files: dict[str, Path]
) -> None:
    found = written(tmp_path / "T", task_files["endings"])
    group, _ = found["pretrain_endings"]
    assert group["task"] == ["pretrain_endings_continued", "pretrain_endings_filled"]
    assert all(metric["weight_by_size"] for metric in group["aggregate_metric_list"])
    settings, records = found["pretrain_endings_continued"]
    assert (settings["doc_to_text"], settings["doc_to_choice"]) == ("given", "scored")
    assert settings["target_delimiter"] == ""
    assert records[1] == {
        "id": "endings/1",
        "given": "Rain.\nQuestion: What falls?\nAnswer:",
        "scored": [" water", " a piano"],
        "gold": 0,
    }
    settings, records = found["pretrain_endings_filled"]
    # a text that is a number makes the choices beginnings
    assert (settings["doc_to_text"], settings["doc_to_choice"]) == ("gold", "given")
    assert records == [
        {
            "id": "endings/2",
            "given": ["Mara lent Ute her boat, so Mara", "Mara lent Ute her boat, so Ute"],
            "scored": " rowed home alone.",
            "gold": 1,
        }
    ]


def test_choices_of_one_kind_make_one_task(tmp_path: Path, write_items: Write) -> None:
    record = {"kind": "multiple_choice", "question": "Up?", "choices": ["a", "b"], "gold": 1}
    found = written(tmp_path / "T", write_items("quiz", [record] * 3), items=2)
    assert list(found) == ["pretrain_quiz"]
    settings, records = found["pretrain_quiz"]
    assert settings["task"] == "pretrain_quiz"
    assert settings["dataset_kwargs"] == {"records": str(tmp_path / "T/pretrain_quiz.jsonl")}
    assert [each["id"] for each in records] == ["quiz/0", "quiz/1"]


def test_text_ends_early_only_where_no_score_can_change(
    tmp_path: Path, task_files: dict[str, Path], write_items: Write
) -> None:
    words = {"kind": "generate", "question": "How many?", "answer": "2020-01-02"}
    files = [task_files["sums"], write_items("words", [words]), task_files["programs"]]
    found = written(tmp_path / "T", *files, max_new_tokens=9)
    # sums end with a line, which counts behind the first word only, and the last is no sum
    assert found["pretrain_sums"][0]["generation_kwargs"]["until"] == []
    assert found["pretrain_words"][0]["generation_kwargs"]["until"] == ["\nQuestion:"]
    settings, records = found["pretrain_programs"]
    common = set(records[0]["ends"]) & set(records[1]["ends"])
    assert set(settings["generation_kwargs"]["until"]) == common
    assert settings["generation_kwargs"]["max_gen_toks"] == 9
    assert settings["unsafe_code"]
    assert records[0]["prompt"] == 'def twice(x):\n    """Two times x."""\n'


def test_likelihoods_are_scored_alike(
    tmp_path: Path, task_files: dict[str, Path], outcomes: dict[str, Outcome]
) -> None:
    found = written(tmp_path / "T", task_files["endings"], task_files["birds"])
    records = {record["id"]: record for _, part in found.values() for record in part}
    items = outcomes["endings"].items
    assert any(item["chosen"] != item["chosen_normalized"] for item in items)
    for item in items:
        results = [(-nats, False) for nats in item["nats"][0]]
        assert scores.choices(records[item["id"]], results) == {
            "acc": float(item["chosen"][0] == item["gold"]),
            "acc_norm": float(item["chosen_normalized"][0] == item["gold"]),
        }
    for item in outcomes["birds"].items:
        nats = item["nats"][0]
        assert scores.perplexity(records[item["id"]], [-nats]) == {
            "word_perplexity": (-nats, item["words"]),
            "byte_perplexity": (-nats, item["bytes"]),
            "bits_per_byte": (-nats, item["bytes"]),
        }


@pytest.mark.parametrize(
    ("question", "answer", "text", "is_right"),
    [
        ("3+4=", "7", " 7\n8", True),
        # a model may go to a new line before it answers
        ("3+4=", "7", "\n7\n8", True),
        ("3+4=", "7", "8\n7", False),
        ("How many?", "7", " Three and four make 7.\nQuestion: And 8?", True),
        ("How many?", "7", " Three and four make 7, or 8.", False),
        ("How much?", "\\frac{1}{2}", " so \\boxed{0.5}", True),
    ],
)
def test_answers_are_scored_alike(
    tmp_path: Path, write_items: Write, question: str, answer: str, text: str, is_right: bool
) -> None:
    path = write_items("sums", [{"kind": "generate", "question": question, "answer": answer}])
    _, (record,) = written(tmp_path / "T", path)["pretrain_sums"]
    assert scores.answers(record, [text]) == {"exact_match": float(is_right)}


def test_programs_are_run_confined(tmp_path: Path, task_files: dict[str, Path]) -> None:
    _, (twice, minus) = written(tmp_path / "T", task_files["programs"])["pretrain_programs"]
    assert scores.programs(twice, ["    return 2 * x\nprint(undefined)"]) == {"passed": 1.0}
    assert scores.programs(twice, ["    return x"]) == {"passed": 0.0}
    assert scores.programs(minus, ["def minus(x):\n    return -x"]) == {"passed": 1.0}


def test_the_command_says_what_to_do_next(tmp_path: Path, task_files: dict[str, Path]) -> None:
    files = f"[{task_files['birds']},{task_files['programs']}]"
    done = run_cli(tmp_path, "harness", "tasks", f"harness.tasks={files}", "harness.to=T")
    assert done.returncode == 0, done.stderr
    assert "--include_path T --tasks pretrain_birds,pretrain_programs" in done.stdout
    assert "--confirm_run_unsafe_code" in done.stdout


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed here")
def test_without_the_harness_it_says_how_to_get_it(tmp_path: Path) -> None:
    done = run_cli(tmp_path, "harness", "run", "--model", "recurrent")
    assert done.returncode == ConfigError.exit_code
    assert "`make harness` makes an environment that has it" in done.stderr


def test_a_file_that_holds_no_items_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="has no items"):
        written(tmp_path / "T", tmp_path / "empty.jsonl")
    assert not (tmp_path / "T").exists()


def test_exact_answers_are_left_to_evaluate(tmp_path: Path, write_items: Write) -> None:
    items = [{"task": "sums", "kind": "exact", "id": "1", "question": "1+1=", "answer": "2"}]
    with pytest.raises(DataError, match="sums has items of kind 'exact', which only"):
        written(tmp_path / "out", write_items("sums", items))
