"""`pretrain evaluate` on tasks: scores are those of a plain computation, item by item.

The plain one knows no batch, no padding and no cache that is shared: one item, one depth, one
forward pass of its own.
"""

import json
import math
import shutil
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import evaluate
from pretrain.compose import load
from pretrain.config import EvaluateConfig
from pretrain.data.tokenizer import Tokenizer
from pretrain.engine.world import World
from pretrain.errors import ConfigError
from pretrain.loop.trained import Trained, load_trained
from pretrain.loop.validation import STATE_SEED
from pretrain.model.decoding import Decoding, Exit
from pretrain.model.depth import Depth
from pretrain.model.generation import generate
from pretrain.model.initial_state import initial_states
from pretrain.tasks.config import EvaluateOptions
from pretrain.tasks.likelihood import Subject, text_rows
from pretrain.tasks.measure import measure
from pretrain.tasks.records import read_task
from pretrain.tasks.report import replace_result
from pretrain.tasks.scores import Outcome
from pretrain.testing import start_commands

DEPTHS = [4, 1, 7]
NEW_TOKENS = 8
Write = Callable[[str, list[dict[str, Any]]], Path]
Found = dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Rows this small gain nothing from threads, and lose much where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def trained(run_dir: Path) -> Trained:
    return load_trained(run_dir, torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="session")
def tokenizer(trained: Trained) -> Tokenizer:
    return Tokenizer.load(trained.config.tokenizer.path)


@pytest.fixture(scope="session")
def evaluated(
    run_dir: Path, task_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Runs the command on so many ranks, and gives the folder that it wrote."""

    def run(ranks: int, *overrides: str, tasks: list[str]) -> Path:
        copy = tmp_path_factory.mktemp("copy") / "run"
        shutil.copytree(run_dir, copy)
        files = ",".join(str(task_files[name]) for name in tasks)
        words = [
            "evaluate", f"run.dir={copy}", f"evaluate.tasks=[{files}]",
            f"evaluate.depths={DEPTHS}".replace(" ", ""),
            f"evaluate.max_new_tokens={NEW_TOKENS}", "evaluate.generate_rows=3", *overrides,
        ]  # fmt: skip
        output = copy.parent / "said"
        processes = start_commands(ranks, words, cwd=copy.parent, output=output)
        try:
            for process in processes:
                process.join(240)
        finally:
            for process in processes:
                process.kill()
        said = "\n".join(path.read_text() for path in sorted(output.iterdir()))
        assert [process.exitcode for process in processes] == [0] * ranks, said
        (copy.parent / "said.txt").write_text(said)
        return copy / "evaluation/step-0000000000"

    return run


ALL = ["birds", "endings", "sums", "places", "programs"]


@pytest.fixture(scope="session")
def folder(evaluated: Callable[..., Path]) -> Path:
    return evaluated(1, "evaluate.run_code=true", tasks=ALL)


@pytest.fixture(scope="session")
def found(folder: Path) -> Found:
    """By task: its summary, and what is said of each item."""
    return {
        name: (
            json.loads((folder / f"{name}.json").read_text()),
            [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()],
        )
        for name in ALL
    }


def plain_logits(trained: Trained, ids: list[int], depth: int) -> torch.Tensor:
    """Logits after each token but the last, from one pass over one row."""
    config = trained.config.model
    state = initial_states(
        [0], seed=STATE_SEED, context=len(ids) - 1, width=config.width, sigma=config.state_sigma
    )
    with torch.no_grad():
        logits: torch.Tensor = trained.model(
            torch.tensor([ids[:-1]]), [Depth(depth, 0)], initial_state=state
        ).logits[0]
    return logits


def plain_nats(trained: Trained, ids: list[int], scored: int, depth: int) -> float:
    """Nats of the last `scored` tokens, from the logits of one pass over one row."""
    logits = plain_logits(trained, ids, depth)
    nats = -logits.double().log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    return float(nats[len(nats) - scored :].sum())


def standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def test_two_ranks_find_what_one_finds(folder: Path, evaluated: Callable[..., Path]) -> None:
    other = evaluated(2, "evaluate.run_code=true", tasks=ALL)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(
        ["score-by-depth.png", *(f"{name}.{end}" for name in ALL for end in ("json", "jsonl"))]
    )
    for name in names:
        if not name.endswith(".png"):
            assert (other / name).read_bytes() == (folder / name).read_bytes(), name


def test_choices_are_scored_as_by_hand(
    found: Found, trained: Trained, tokenizer: Tokenizer
) -> None:
    summary, items = found["endings"]
    texts = [
        ("He opens the window. He", [" breathes.", " is a ceiling made of very thin paper.",
                                     " sings"]),
        ("Rain.\nQuestion: What falls?\nAnswer:", [" water", " a piano"]),
        (None, ["Mara lent Ute her boat, so Mara", "Mara lent Ute her boat, so Ute"]),
    ]  # fmt: skip
    right: dict[str, list[list[float]]] = {"sum": [], "size": []}
    for item, (given, choices) in zip(items, texts, strict=False):
        scores = {"sum": [], "size": []}  # type: dict[str, list[float]]
        for at, depth in enumerate(DEPTHS):
            pairs = [(given, c) for c in choices] if given else [(c, " rowed home alone.")
                                                                 for c in choices]  # fmt: skip
            nats = []
            for before, scored in pairs:
                tail = tokenizer.encode(scored)
                ids = [tokenizer.special.begin_text, *tokenizer.encode(before), *tail]
                nats.append(plain_nats(trained, ids, len(tail), depth))
            # float32 sums of some ten tokens in products of another shape
            assert item["nats"][at] == pytest.approx(nats, rel=1e-4)
            per_size = [n / len(p[1].strip()) for n, p in zip(nats, pairs, strict=True)]
            assert item["chosen"][at] == nats.index(min(nats))
            assert item["chosen_normalized"][at] == per_size.index(min(per_size))
            scores["sum"].append(float(item["chosen"][at] == item["gold"]))
            scores["size"].append(float(item["chosen_normalized"][at] == item["gold"]))
        assert not item["is_cut"]
        right["sum"].append(scores["sum"])
        right["size"].append(scores["size"])
    # the two ways to choose and the depths do not all agree, or this test would see nothing
    assert len({item["chosen"][0] for item in items}) > 1
    assert any(item["chosen"] != item["chosen_normalized"] for item in items)
    for name, key in (("accuracy", "chosen"), ("accuracy_normalized", "chosen_normalized")):
        for at in range(len(DEPTHS)):
            values = [float(item[key][at] == item["gold"]) for item in items]
            score = summary["scores"][name]
            assert score["value"][at] == pytest.approx(statistics.mean(values))
            assert score["standard_error"][at] == pytest.approx(standard_error(values))


def test_a_beginning_that_does_not_fit_is_left_out(
    found: Found, trained: Trained, tokenizer: Tokenizer, task_files: dict[str, Path]
) -> None:
    summary, items = found["endings"]
    assert [item["is_cut"] for item in items] == [False, False, False, True]
    assert summary["items_cut"] == 1
    record = json.loads(task_files["endings"].read_text().splitlines()[3])
    given = f"{record['context']}\nQuestion: {record['question']}\nAnswer:"
    for at, choice in enumerate(record["choices"]):
        tail = tokenizer.encode(" " + choice)
        ids = [*tokenizer.encode(given), *tail][-trained.config.model.context :]
        nats = plain_nats(trained, [tokenizer.special.begin_text, *ids], len(tail), DEPTHS[2])
        assert items[3]["nats"][2][at] == pytest.approx(nats, rel=1e-4)


def test_perplexity_counts_every_token_once(
    found: Found, trained: Trained, tokenizer: Tokenizer, task_files: dict[str, Path]
) -> None:
    summary, items = found["birds"]
    texts = [json.loads(line)["text"] for line in task_files["birds"].read_text().splitlines()]
    context = trained.config.model.context
    assert len(tokenizer.encode(texts[1])) > 2 * context
    for item, text in zip(items, texts, strict=True):
        ids = [tokenizer.special.begin_text, *tokenizer.encode(text)]
        counts = (item["tokens"], item["bytes"], item["words"])
        assert counts == (len(ids) - 1, len(text.encode()), len(text.split()))
        for at, depth in enumerate(DEPTHS):
            nats, done = 0.0, 1
            while done < len(ids):
                more = context if done == 1 else context // 2
                window = ids[: done + more][-context - 1 :]
                scored = min(more, len(ids) - done)
                nats += plain_nats(trained, window, scored, depth)
                done += scored
            assert item["nats"][at] == pytest.approx(nats, rel=1e-4)
    for unit in ("token", "byte", "word"):
        sizes = [item[f"{unit}s"] for item in items]
        for at in range(len(DEPTHS)):
            score = summary["scores"][f"nats_per_{unit}"]
            value = sum(item["nats"][at] for item in items) / sum(sizes)
            assert score["value"][at] == pytest.approx(value)
            residuals = [i["nats"][at] - value * s for i, s in zip(items, sizes, strict=True)]
            error = math.sqrt(len(items) * sum(r * r for r in residuals) / (len(items) - 1))
            assert score["standard_error"][at] == pytest.approx(error / sum(sizes))


@pytest.mark.parametrize("length", [1, 7, 8, 9, 12, 13, 40])
def test_windows_see_at_least_half_a_context(tokenizer: Tokenizer, length: int) -> None:
    context, text = 8, "x y z " * 40
    ids = tokenizer.encode(text)[:length]
    rows = text_rows(tokenizer, tokenizer.decode(ids), context)
    assert sum(row.scored for row in rows) == len(ids)
    assert [i for row in rows for i in row.ids[len(row.ids) - row.scored :]] == ids
    assert all(len(row.ids) <= context + 1 for row in rows)
    assert all(len(row.ids) - row.scored >= context // 2 for row in rows[1:])


def plain_answer(
    trained: Trained, tokenizer: Tokenizer, prompt: str, depth: int, **rule: Any
) -> tuple[str, int]:
    ids = [tokenizer.special.begin_text, *tokenizer.encode(prompt)]
    how = Decoding(
        num_steps=depth,
        max_new_tokens=NEW_TOKENS,
        seed=STATE_SEED,
        stop_ids=tokenizer.special.stops(),
        **rule,
    )
    chosen = list(generate(trained.model, ids, how))
    return tokenizer.decode([c.token for c in chosen]), sum(c.steps for c in chosen)


def test_answers_are_those_of_one_prompt_alone(
    found: Found, trained: Trained, tokenizer: Tokenizer, task_files: dict[str, Path]
) -> None:
    summary, items = found["sums"]
    records = [json.loads(line) for line in task_files["sums"].read_text().splitlines()]
    texts = set()
    for item, record in zip(items, records, strict=True):
        question = record["question"]
        is_sum = question.endswith("=")
        for at, depth in enumerate(DEPTHS):
            prompt = question if is_sum else f"Question: {question}\nAnswer:"
            text, _ = plain_answer(trained, tokenizer, prompt, depth)
            if is_sum and "\n" in text.lstrip():
                blank = len(text) - len(text.lstrip())
                text = text[:blank] + text.lstrip().split("\n")[0]
            assert item["text"][at] == text
            assert item["steps"][at] == depth * item["tokens"][at]
            texts.add(text)
    assert len(texts) > 3
    assert summary["scores"]["exact_match"]["value"] == [
        statistics.mean(float(item["is_right"][at]) for item in items) for at in range(len(DEPTHS))
    ]


def measured(
    trained: Trained, tokenizer: Tokenizer, path: Path, depths: list[int], **options: Any
) -> Outcome:
    """One task, measured in this process."""
    subject = Subject(
        model=trained.model,
        tokenizer=tokenizer,
        world=World(0, 1, 0, torch.device("cpu")),
        depths=tuple(depths),
        batch_tokens=256,
    )
    chosen = EvaluateOptions(depths=depths, rows=1, tasks=[str(path)], **options)
    return measure(subject, read_task(path), chosen)


def test_hits_are_those_of_the_likeliest_tokens(
    found: Found, trained: Trained, tokenizer: Tokenizer, task_files: dict[str, Path]
) -> None:
    summary, items = found["places"]
    records = [json.loads(line) for line in task_files["places"].read_text().splitlines()]
    for item, record in zip(items, records, strict=True):
        given = tokenizer.encode(record["question"])
        whole = tokenizer.encode(record["question"] + record["answer"])
        # these answers begin with a token of their own
        assert whole[: len(given)] == given
        assert item["tokens"] == len(whole) - len(given)
        for at, depth in enumerate(DEPTHS):
            likeliest = plain_likeliest(trained, [tokenizer.special.begin_text, *whole], depth)
            hits = [a == b for a, b in zip(likeliest, whole, strict=True)][len(given) :]
            assert item["hits"][at] == sum(hits)
            assert item["is_right"][at] == all(hits)
    tokens = sum(item["tokens"] for item in items)
    assert summary["scores"]["token_accuracy"]["value"] == [
        sum(item["hits"][at] for item in items) / tokens for at in range(len(DEPTHS))
    ]


def plain_likeliest(trained: Trained, ids: list[int], depth: int) -> list[int]:
    """The likeliest token after each but the last."""
    likeliest: list[int] = plain_logits(trained, ids, depth).argmax(-1).tolist()
    return likeliest


def test_an_answer_is_exact_where_greedy_text_is_it(
    trained: Trained, tokenizer: Tokenizer, write_items: Write
) -> None:
    records, expected = [], []
    for question in ("How many herons", "The water", "Who waits", "Rain falls", "He opens"):
        greedy = [plain_ids(trained, tokenizer, question, depth) for depth in DEPTHS]
        for ids in greedy:
            # as much of what is written as is read again as the same tokens
            count = max(
                (n for n in range(1, NEW_TOKENS + 1) if reads_back(tokenizer, question, ids[:n])),
                default=0,
            )
            if not count:
                continue
            text = tokenizer.decode(ids[:count])
            records.append({"kind": "exact", "question": question, "answer": text})
            expected.append([ids[:count] == other[:count] for other in greedy])
    outcome = measured(trained, tokenizer, write_items("herons", records), DEPTHS)
    assert [item["is_right"] for item in outcome.items] == expected
    assert {True, False} <= {is_right for row in expected for is_right in row}
    assert outcome.measure == "exact_match"


def plain_ids(trained: Trained, tokenizer: Tokenizer, prompt: str, depth: int) -> list[int]:
    ids = [tokenizer.special.begin_text, *tokenizer.encode(prompt)]
    how = Decoding(num_steps=depth, max_new_tokens=NEW_TOKENS, seed=STATE_SEED)
    return [chosen.token for chosen in generate(trained.model, ids, how)]


def reads_back(tokenizer: Tokenizer, question: str, ids: list[int]) -> bool:
    text = tokenizer.decode(ids)
    return bool(text.strip()) and tokenizer.encode(question + text) == [
        *tokenizer.encode(question), *ids,
    ]  # fmt: skip


def test_an_exit_rule_spares_iterations(
    trained: Trained, tokenizer: Tokenizer, write_items: Write
) -> None:
    questions = ["How many herons?", "Who waits?"]
    records = [{"kind": "generate", "question": each, "answer": "2"} for each in questions]
    path = write_items("sums", records)
    options = {"exit": Exit.latent_diff, "exit_threshold": 0.3, "max_new_tokens": NEW_TOKENS}
    outcome = measured(trained, tokenizer, path, [1, 7], **options)
    for item, question in zip(outcome.items, questions, strict=True):
        # one iteration has nothing to exit from
        assert item["steps"][0] == item["tokens"][0]
        prompt = f"Question: {question}\nAnswer:"
        text, steps = plain_answer(
            trained, tokenizer, prompt, 7, exit=Exit.latent_diff, exit_threshold=0.3
        )
        assert item["tokens"][1] == NEW_TOKENS
        assert (item["text"][1], item["steps"][1]) == (text, steps)
        assert steps < 7 * NEW_TOKENS


def test_what_is_right_counts(trained: Trained, tokenizer: Tokenizer, write_items: Write) -> None:
    text, _ = plain_answer(trained, tokenizer, "3+4=", 4)
    answers = [text.strip().split("\n")[0], "nothing of the kind"]
    records = [{"kind": "generate", "question": "3+4=", "answer": answer} for answer in answers]
    path = write_items("sums", records)
    outcome = measured(trained, tokenizer, path, [4], max_new_tokens=NEW_TOKENS)
    assert [item["is_right"] for item in outcome.items] == [[True], [False]]
    assert outcome.scores["exact_match"] == [(0.5, 0.5)]


def test_programs_that_pass_count(
    trained: Trained, tokenizer: Tokenizer, write_items: Write
) -> None:
    # whatever two tokens it adds to a comment, the function before it stays right
    records = [
        {"kind": "code", "prompt": "def one(): return 1\n# it", "canonical_solution": "x",
         "test": f"def check(function): assert function() == {value}", "entry_point": "one"}
        for value in (1, 2)
    ]  # fmt: skip
    path = write_items("programs", records)
    outcome = measured(trained, tokenizer, path, [1], max_new_tokens=2, run_code=True)
    assert [item["is_passed"] for item in outcome.items] == [[True], [False]]
    assert outcome.items[1]["why"] == ["AssertionError"]
    assert outcome.scores["passed"] == [(0.5, 0.5)]


def test_programs_are_run_and_judged(found: Found) -> None:
    summary, items = found["programs"]
    assert summary["scores"]["passed"] == {
        "value": [0.0, 0.0, 0.0],
        "standard_error": [0.0, 0.0, 0.0],
    }
    # weights that have learned nothing write no program, and each says what was wrong with it
    assert all("Error" in why for item in items for why in item["why"])


def compose(run_dir: Path, files: list[Path], *overrides: str) -> EvaluateConfig:
    words = [f"run.dir={run_dir}", f"evaluate.tasks=[{','.join(map(str, files))}]", *overrides]
    config = load("evaluate", words)
    assert isinstance(config, EvaluateConfig)
    return config


@pytest.mark.parametrize(
    ("tasks", "override", "said"),
    [
        (["programs"], "evaluate.rows=1", r"programs is judged by running .*run_code=true"),
        (["sums"], "evaluate.run_code=true", r"run_code=true would do nothing: no task"),
        (["birds"], "evaluate.exit=kl", r"exit=kl would do nothing: no task is of kind generate"),
        ([], "evaluate.items=3", r"evaluate\.items=3 would do nothing without evaluate\.tasks"),
        ([], "evaluate.run_code=true", r"run_code=true would do nothing without"),
        (["sums"], "evaluate.items=0", r"evaluate\.items=0 must be at least 1"),
        (["sums"], "evaluate.exit_threshold=1", r"exit_threshold=1\.0 would do nothing"),
        (["sums"], "evaluate.depths=[4,4]", r"names a depth twice"),
        (["sums", "sums"], "evaluate.rows=1", r"evaluate\.tasks names sums more than once"),
        (["sums"], "evaluate.code.memory_bytes=1000", r"does not hold a Python interpreter"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_loaded(
    task_files: dict[str, Path], tmp_path: Path, tasks: list[str], override: str, said: str
) -> None:
    # there is no run at tmp_path, so that whoever looked for it would say so
    with pytest.raises(ConfigError, match=said):
        evaluate.main(compose(tmp_path, [task_files[name] for name in tasks], override))


def test_answers_that_have_no_room_are_said_to_be_shorter(
    run_dir: Path, task_files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = shutil.copytree(run_dir, tmp_path / "run")
    one = ("evaluate.depths=[1]", "evaluate.items=1", "evaluate.max_new_tokens=1000")
    for name, said in (("birds", 0), ("sums", 1)):
        caplog.clear()
        evaluate.main(compose(copy, [task_files[name]], *one))
        assert caplog.text.count("evaluate.max_new_tokens=1000") == said


def test_a_folder_that_takes_no_results_is_named_before_anything_is_measured(
    run_dir: Path, task_files: dict[str, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(run_dir, tmp_path / "run")
    (copy / "evaluation").touch()
    with pytest.raises(ConfigError, match=f"{copy}/evaluation.*permission"):
        evaluate.main(compose(copy, [task_files["birds"]]))


def test_a_result_takes_the_place_of_another_and_loses_none(tmp_path: Path) -> None:
    path = tmp_path / "step-0000000006.json"
    for text in ("first", "first", "second", "third"):
        replace_result(path, text)
    assert path.read_text() == "third"
    earlier = {each.name: each.read_text() for each in (tmp_path / "earlier").iterdir()}
    assert earlier == {"step-0000000006-1.json": "first", "step-0000000006-2.json": "second"}
