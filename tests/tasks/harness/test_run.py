"""lm-evaluation-harness itself, in its own environment: its scores are ours, item by item.

Asked are the tasks that `pretrain harness tasks` writes, and tasks in its own terms, whose
prompts, metrics and readers are all its own, over the same files of items.
"""

import json
import math
import os
import re
import statistics
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from pretrain import export
from pretrain.compose import load
from pretrain.data.tokenizer import Tokenizer
from pretrain.engine.world import World
from pretrain.errors import CheckpointError
from pretrain.harness.tasks import main as write_tasks
from pretrain.loop.trained import load_trained
from pretrain.model.decoding import Exit
from pretrain.tasks.config import EvaluateOptions
from pretrain.tasks.likelihood import Row, Subject, continuation_row, greedy_nats_of
from pretrain.tasks.measure import measure
from pretrain.tasks.prompts import Continuation, cut, question_prompt
from pretrain.tasks.records import Question, read_task
from pretrain.tasks.scores import Outcome

ROOT = Path(__file__).resolve().parents[3]
HARNESS = ROOT / ".venv-harness/bin/python"
IS_REQUIRED = os.environ.get("PRETRAIN_HARNESS_TESTS") == "required"
DEPTH, NEW_TOKENS = 4, 8
# so high that tokens exit before four iterations, and text becomes another
EXIT = {"exit": Exit.latent_diff, "exit_threshold": 0.6}
# float32 sums of some hundred tokens in products of another shape
TOLERANCE = 1e-4
# Importing lm-evaluation-harness alone takes some ten seconds of a core.
TIMEOUT_S = 600

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2 * TIMEOUT_S),
    pytest.mark.skipif(
        not HARNESS.is_file() and not IS_REQUIRED, reason="needs .venv-harness: make harness"
    ),
]

QUIZ = [
    {"kind": "multiple_choice", "question": "Which bird waits?", "gold": 1,
     "choices": ["an eel", "the heron", "a very small house of grey stone", "it"]},
    {"kind": "multiple_choice", "question": "Which is water?", "gold": 2,
     "choices": ["stone by the shallow water", "a bird", "rain"]},
    {"kind": "multiple_choice", "question": "Who sings?", "gold": 0,
     "choices": ["nobody at all", "the birds", "Ute"]},
    {"kind": "multiple_choice", "question": "Where is it?", "gold": 0,
     "choices": ["in", "under the old window of the house"]},
]  # fmt: skip

ITS_OWN = {
    "own_quiz": """
dataset_kwargs: {data_files: {test: FOLDER/quiz.jsonl}}
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "own_birds": """
dataset_kwargs: {data_files: {test: FOLDER/birds.jsonl}}
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "own_sums": """
dataset_kwargs: {data_files: {test: FOLDER/told.jsonl}}
output_type: generate_until
doc_to_text: question
doc_to_target: answer
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
""",
    "own_last_word": """
dataset_kwargs: {data_files: {test: FOLDER/told.jsonl}}
output_type: loglikelihood
doc_to_text: question
doc_to_target: next
target_delimiter: ""
metric_list: [{metric: acc}, {metric: perplexity}]
""",
    "own_draws": """
dataset_kwargs: {data_files: {test: FOLDER/told.jsonl}}
output_type: generate_until
doc_to_text: question
doc_to_target: answer
generation_kwargs: {until: [], max_gen_toks: 8, do_sample: true, temperature: 1.0}
repeats: 2
metric_list: [{metric: exact_match}]
""",
}


class Ours(NamedTuple):
    """What is measured here, and the folder of tasks that asks for the same."""

    outcomes: dict[str, Outcome]
    subject: Subject
    folder: Path
    told: list[dict[str, Any]]


class Theirs(NamedTuple):
    """What lm-evaluation-harness wrote: scores by task and metric, and samples by task."""

    scores: dict[str, dict[str, float]]
    samples: dict[str, list[dict[str, Any]]]
    about: dict[str, Any]


@pytest.fixture(scope="module")
def ours(
    run_dir: Path, task_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Ours:
    trained = load_trained(run_dir, torch.device("cpu"), dtype=torch.float32)
    subject = Subject(
        model=trained.model,
        tokenizer=Tokenizer.load(trained.config.tokenizer.path),
        world=World(0, 1, 0, torch.device("cpu")),
        depths=(DEPTH,),
        batch_tokens=256,
    )
    folder = tmp_path_factory.mktemp("harness")
    lines = [{"task": "quiz", "id": f"quiz/{at}"} | item for at, item in enumerate(QUIZ)]
    (folder / "quiz.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "birds.jsonl").write_text(task_files["birds"].read_text())
    # exact answers are left to `evaluate`
    asked = [path for name, path in task_files.items() if name != "places"]
    files = [*asked, folder / "quiz.jsonl"]
    options = EvaluateOptions(
        depths=[DEPTH], rows=1, max_new_tokens=NEW_TOKENS, run_code=True, tasks=["all"], **EXIT
    )
    outcomes = {path.stem: measure(subject, read_task(path), options) for path in files}
    words = [f"harness.tasks=[{','.join(map(str, files))}]", f"harness.to={folder}"]
    write_tasks(load("harness", [*words, f"harness.max_new_tokens={NEW_TOKENS}"]))
    told = _told(task_files["sums"], outcomes["sums"])
    (folder / "told.jsonl").write_text("\n".join(map(json.dumps, told)))
    for name, text in ITS_OWN.items():
        head = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + text.replace("FOLDER", str(folder)))
    return Ours(outcomes, subject, folder, told)


def _told(path: Path, outcome: Outcome) -> list[dict[str, Any]]:
    """The sums, half of them with what the model writes for an answer, as it is."""
    found = []
    for at, (question, item) in enumerate(zip(read_task(path).items, outcome.items, strict=True)):
        assert isinstance(question, Question)
        (text,) = item["text"]
        found.append(
            {
                "question": question_prompt(question).text,
                "answer": text.split("\n")[0] if at % 2 else "-",
                "next": text if at % 3 else " no",
            }
        )
    return found


def harness(
    words: list[str], folder: Path, launcher: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """The command in its environment, offline."""
    return subprocess.run(
        [str(HARNESS), *launcher, "-m", "pretrain", "harness", "run", *words],
        cwd=folder,
        env=os.environ | {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1",
            "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def asked(
    run_dir: Path, ours: Ours, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Theirs]:
    def run(*launcher: str, tasks: list[str], model: list[str]) -> Theirs:
        output = tmp_path_factory.mktemp("said")
        words = [
            *model, "--device", "cpu", "--include_path", str(ours.folder), "--tasks",
            ",".join(tasks), "--confirm_run_unsafe_code", "--log_samples",
            "--output_path", str(output),
        ]  # fmt: skip
        done = harness(words, output, launcher)
        assert done.returncode == 0, done.stdout + done.stderr
        return _read(output)

    return run


def _read(output: Path) -> Theirs:
    (path,) = output.rglob("results_*.json")
    results = json.loads(path.read_text())
    scores = {
        task: {name.split(",")[0]: value for name, value in found.items() if ",none" in name}
        for task, found in results["results"].items()
    }
    samples = {}
    for path in output.rglob("samples_*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        name = path.name.removeprefix("samples_").rsplit("_", 1)[0]
        samples[name] = sorted(lines, key=lambda sample: int(sample["doc_id"]))
    return Theirs(scores, samples, results["config"])


RECURRENT = ["--model", "recurrent", "--model_args"]


def model(run_dir: Path, batch_size: str) -> list[str]:
    """The words that ask for the run as it is measured here."""
    arguments = f"run_dir={run_dir},num_steps={DEPTH},exit=latent_diff,exit_threshold=0.6"
    return [*RECURRENT, arguments, "--batch_size", batch_size]


WRITTEN = [f"pretrain_{name}" for name in ("birds", "endings", "sums", "programs", "quiz")]


@pytest.fixture(scope="module")
def alone(asked: Callable[..., Theirs], run_dir: Path) -> Theirs:
    return asked(tasks=[*WRITTEN, *ITS_OWN], model=model(run_dir, "auto"))


def value(outcome: Outcome, measure: str) -> float:
    (score,) = outcome.scores[measure]
    return score.value


@pytest.mark.parametrize("name", ["endings", "quiz"])
def test_choices_are_scored_alike(ours: Ours, alone: Theirs, name: str) -> None:
    outcome = ours.outcomes[name]
    samples = {
        sample["doc"]["id"]: sample
        for task, found in alone.samples.items()
        if task.startswith(f"pretrain_{name}")
        for sample in found
    }
    assert len(samples) == len(outcome.items)
    for item in outcome.items:
        sample = samples[item["id"]]
        likelihoods = [float(likelihood) for likelihood, _ in sample["filtered_resps"]]
        assert likelihoods == pytest.approx([-nats for nats in item["nats"][0]], rel=TOLERANCE)
        assert sample["acc"] == (item["chosen"][0] == item["gold"])
        assert sample["acc_norm"] == (item["chosen_normalized"][0] == item["gold"])
    scores = alone.scores[f"pretrain_{name}"]
    assert scores["acc"] == pytest.approx(value(outcome, "accuracy"))
    assert scores["acc_norm"] == pytest.approx(value(outcome, "accuracy_normalized"))


def test_its_own_choices_get_our_scores(ours: Ours, alone: Theirs) -> None:
    outcome, samples = ours.outcomes["quiz"], alone.samples["own_quiz"]
    for item, sample in zip(outcome.items, samples, strict=True):
        likelihoods = [float(likelihood) for likelihood, _ in sample["filtered_resps"]]
        assert likelihoods == pytest.approx([-nats for nats in item["nats"][0]], rel=TOLERANCE)
        assert sample["acc"] == (item["chosen"][0] == item["gold"])
        assert sample["acc_norm"] == (item["chosen_normalized"][0] == item["gold"])
    accuracies = [value(outcome, name) for name in ("accuracy", "accuracy_normalized")]
    # some are right and some wrong, or this test would see nothing
    assert all(0 < accuracy < 1 for accuracy in accuracies)
    found = alone.scores["own_quiz"]
    assert [found["acc"], found["acc_norm"]] == pytest.approx(accuracies)


def test_texts_are_as_likely(ours: Ours, alone: Theirs) -> None:
    outcome = ours.outcomes["birds"]
    for task in ("pretrain_birds", "own_birds"):
        for item, sample in zip(outcome.items, alone.samples[task], strict=True):
            assert sample["doc"]["id"] == item["id"]
            likelihood = float(sample["filtered_resps"][0])
            assert likelihood == pytest.approx(-item["nats"][0], rel=TOLERANCE)
    by_byte = value(outcome, "nats_per_byte")
    for task in ("pretrain_birds", "own_birds"):
        scores = alone.scores[task]
        assert scores["bits_per_byte"] == pytest.approx(by_byte / math.log(2), rel=TOLERANCE)
        assert scores["byte_perplexity"] == pytest.approx(math.exp(by_byte), rel=10 * TOLERANCE)
    by_word = value(outcome, "nats_per_word")
    found = alone.scores["pretrain_birds"]["word_perplexity"]
    assert math.log(found) == pytest.approx(by_word, rel=TOLERANCE)
    # its own count has one more word where a text begins or ends with white space
    texts = [sample["doc"]["text"] for sample in alone.samples["own_birds"]]
    words, more = (sum(len(split(text)) for text in texts) for split in (str.split, _its_split))
    assert more == words + 1
    found = alone.scores["own_birds"]["word_perplexity"]
    assert math.log(found) == pytest.approx(by_word * words / more, rel=TOLERANCE)


def _its_split(text: str) -> list[str]:
    return re.split(r"\s+", text)


def test_answers_are_the_same_text(ours: Ours, alone: Theirs, task_files: dict[str, Path]) -> None:
    outcome = ours.outcomes["sums"]
    whole = EvaluateOptions(depths=[DEPTH], rows=1, max_new_tokens=NEW_TOKENS)
    items = measure(ours.subject, read_task(task_files["sums"]), whole).items
    # without an exit they would be others
    assert [item["text"] for item in items] != [item["text"] for item in outcome.items]
    for item, sample in zip(outcome.items, alone.samples["pretrain_sums"], strict=True):
        (text,) = sample["filtered_resps"]
        ends = tuple(sample["doc"]["ends"])
        before = cut(text, ends)
        assert (text if before is None else before) == item["text"][0]
        assert sample["exact_match"] == item["is_right"][0]
    assert alone.scores["pretrain_sums"]["exact_match"] == value(outcome, "exact_match")
    for told, sample in zip(ours.told, alone.samples["own_sums"], strict=True):
        (text,) = sample["filtered_resps"]
        assert sample["exact_match"] == (text == told["answer"])
    # half of them were told what the model writes
    assert alone.scores["own_sums"]["exact_match"] == 0.5


def test_programs_are_judged_alike(ours: Ours, alone: Theirs) -> None:
    outcome = ours.outcomes["programs"]
    for item, sample in zip(outcome.items, alone.samples["pretrain_programs"], strict=True):
        assert sample["filtered_resps"] == item["text"]
        assert sample["passed"] == item["is_passed"][0]


def test_it_is_told_what_greedy_decoding_writes(ours: Ours, alone: Theirs) -> None:
    rows = [
        continuation_row(
            ours.subject.tokenizer,
            Continuation(told["question"], told["next"]),
            ours.subject.context,
        )
        for told in ours.told
    ]
    found = greedy_nats_of(ours.subject, rows, "told")
    assert {is_greedy for _, is_greedy in found} == {True, False}
    for (nats, is_greedy), sample in zip(found, alone.samples["own_last_word"], strict=True):
        ((likelihood, told_greedy),) = sample["filtered_resps"]
        assert float(likelihood) == pytest.approx(-nats, rel=TOLERANCE)
        assert (told_greedy in (True, "True")) == is_greedy
        assert sample["acc"] == is_greedy


def test_the_results_say_what_was_measured(ours: Ours, alone: Theirs) -> None:
    about = alone.about
    assert (about["step"], about["num_steps"], about["model_dtype"]) == (0, DEPTH, "float32")
    assert about["tokenizer_sha256"] == ours.subject.tokenizer.sha256
    parameters = sum(p.numel() for p in ours.subject.model.parameters())
    assert about["model_num_parameters"] == parameters


def test_two_ranks_answer_as_one(
    asked: Callable[..., Theirs], alone: Theirs, run_dir: Path
) -> None:
    tasks = ["pretrain_birds", "pretrain_quiz", "pretrain_sums", "own_last_word", "own_draws"]
    two = asked(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        tasks=tasks,
        model=model(run_dir, "3"),
    )  # fmt: skip
    for task in tasks:
        for one, other in zip(alone.samples[task], two.samples[task], strict=True):
            assert other["doc"] == one["doc"]
            assert _split(other)[0] == pytest.approx(_split(one)[0], rel=TOLERANCE)
            assert _split(other)[1] == _split(one)[1]
        # bits and perplexities are functions of the likelihoods, shares of items equal
        for name, score in alone.scores[task].items():
            if isinstance(score, float) and "perplexity" not in name:
                assert two.scores[task][name] == pytest.approx(score, rel=TOLERANCE), (task, name)
    draws = [sample["resps"][0] for sample in alone.samples["own_draws"]]
    assert draws == [sample["resps"][0][:2] for sample in two.samples["own_draws"]]
    assert all(len(each) == 2 for each in draws)
    # each repetition has draws of its own
    assert sum(first != second for first, second in draws) > len(draws) // 2


def test_its_own_model_of_an_export_agrees_up_to_its_start_states(
    asked: Callable[..., Theirs],
    ours: Ours,
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    export.main(load("export", [f"run.dir={run_dir}", f"export.to={tmp_path / 'G'}"]))
    arguments = f"pretrained={tmp_path / 'G'},trust_remote_code=true,dtype=float32"
    theirs = asked(tasks=["pretrain_quiz"], model=["--model", "hf", "--model_args", arguments])
    likelihoods, rows = [], []
    for sample in theirs.samples["pretrain_quiz"]:
        likelihoods += [float(likelihood) for likelihood, _ in sample["filtered_resps"]]
        for text in sample["doc"]["scored"]:
            part = Continuation(sample["doc"]["given"], text)
            row = continuation_row(ours.subject.tokenizer, part, ours.subject.context)
            # this tokenizer leaves out the token that begins texts
            rows.append(Row(row.ids[1:], row.scored))
    found = []
    for seed in range(16):
        monkeypatch.setattr("pretrain.tasks.likelihood.STATE_SEED", seed)
        found.append([-nats for nats, _ in greedy_nats_of(ours.subject, rows, "rows")])
    for likelihood, drawn in zip(likelihoods, zip(*found, strict=True), strict=True):
        # its start states are one more draw: spreads are 0.2 to 0.9 nats, choices 7 to 137
        assert abs(likelihood - statistics.mean(drawn)) < 5 * statistics.stdev(drawn)


def test_mistakes_are_said_as_everywhere(tmp_path: Path) -> None:
    done = harness([*RECURRENT, f"run_dir={tmp_path}/none", "--tasks", "arc_easy"], tmp_path)
    assert done.returncode == CheckpointError.exit_code
    assert f"{tmp_path}/none" in done.stderr
    assert "Traceback" not in done.stderr


def _split(sample: dict[str, Any]) -> tuple[list[float], list[str]]:
    """What the model answered: likelihoods, and all that is no number."""
    numbers, others = [], []
    for answer in sample["filtered_resps"]:
        for part in answer if isinstance(answer, list) else [answer]:
            try:
                numbers.append(float(part))
            except ValueError:
                others.append(part)
    return numbers, others
