"""Does thinking longer add better: sums of growing length, with and without places of digits.

    python kernels/benchmarks/arithmetic.py seconds=300

Makes text, tokenizer and shards of sums of up to `digits` digits an operand, then trains side by
side on one GPU, from conf/experiment/addition.yaml: recurrent with places of digits (two seeds),
recurrent without, and depth 1 with places and as many parameters. All take the same steps: who gets
ahead is paused. At 56 % of the time all are stopped, and resume with as many steps as the time left
affords, over which the rate falls. Then every run is asked `items` sums of two numbers of each
length up to `longest`, at all depths in one pass; an answer is right if greedy text would be it, to
its end. Rows go to results/arithmetic.csv, pictures to docs/images (arithmetic_plots.py).

With `order=highest` numbers are written from their highest digit on, so that all carries must be
known before the first digit of the sum (pretrain/data/addition.py); rows then go to
results/arithmetic-highest.csv.

    python kernels/benchmarks/arithmetic.py order=highest seconds=2400 digits=5 longest=8 \
        threads=1 into=out/arithmetic model.width=64 model.heads=4 model.inner=128 \
        model.context=64 model.digit_positions=10 depth.mean=6 depth.backprop=4 \
        batch.global_tokens=2048 batch.micro_rows=32 engine=zero1 optimizer.learning_rate=3e-3 \
        schedule.warmup_tokens=60000 data.max_bytes=6000000

is the same on a CPU, in small: one run needs some 2,400 steps, which take eight minutes of a core.
`into` names another folder for rows and pictures. All words but those of `Options` are overrides of
every run. The runs share a GPU, so their speeds say nothing.
"""

import csv
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from arithmetic_plots import IMAGES, plot
from measurements import RESULTS, card, commit
from pretrain.compose import thaw
from pretrain.data.addition import items as make_items
from pretrain.data.config import DigitOrder
from pretrain.errors import EXIT_FINISHED, EXIT_SAVED_ON_SIGNAL
from reliability import steps as steps_of

TABLES = {"lowest": "arithmetic.csv", "highest": "arithmetic-highest.csv"}
DEPTHS = (1, 2, 4, 8, 16, 32, 64)
PLACES, NONE = "recurrent, places", "recurrent, no places"
RUNS: dict[tuple[str, int], list[str]] = {
    (PLACES, 0): [],
    (PLACES, 1): [],
    (NONE, 0): ["model.digit_positions=null"],
    ("depth 1, places", 0): ["depth=fixed", "depth.mean=1", "depth.backprop=1"],
}
COLUMNS = (
    "order", "run", "seed", "length", "depth", "accuracy", "n", "standard_error", "token_accuracy",
    "trained_digits", "steps", "tokens", "loss_nats", "device", "commit",
)  # fmt: skip
# Of all seconds: until the runs are told to stop, and until the resumed ones should have ended.
STOP_AT, END_AT = 0.56, 0.82
# Steps that a run may be ahead of the slowest.
LEAD = 40
SAFETY = 0.9


@dataclass
class Options:
    """Words of the command line; the rest are overrides."""

    seconds: float = 300.0
    """For all of it."""
    digits: int = 10
    """Of the longest operand in training."""
    longest: int = 20
    """Operand that is asked for."""
    items: int = 300
    """Sums of each length."""
    order: str = "lowest"
    """From which end numbers are written: lowest, or highest, where all carries come first."""
    threads: int = 4
    """Of each process on the CPU."""
    out: str = "out/arithmetic"
    """Where tokenizer, shards, tasks and runs are made, in a folder for each order."""
    into: str = ""
    """Where rows and pictures go, in place of the repository's folders."""

    @staticmethod
    def read(words: list[str]) -> tuple["Options", list[str]]:
        """The options, and the words that are none."""
        kinds = {field.name: type(getattr(Options(), field.name)) for field in fields(Options)}
        given, rest = {}, []
        for word in words:
            key, _, value = word.partition("=")
            if key in kinds:
                given[key] = kinds[key](value)
            else:
                rest.append(word)
        return Options(**given), rest


@dataclass
class Run:
    """One model, trained by `pretrain train` in a process of its own."""

    name: str
    seed: int
    folder: Path
    words: list[str]
    process: subprocess.Popen[bytes] | None = None

    def start(self, threads: int, *more: str) -> None:
        """Begin, or go on."""
        (self.folder / "control/stop").unlink(missing_ok=True)
        words = ["train", *self.words, f"run.dir={self.folder}", f"run.seed={self.seed}", *more]
        self.process = command(words, self.log, threads)

    @property
    def log(self) -> Path:
        """What its processes said."""
        return self.folder.with_suffix(".log")

    @property
    def is_running(self) -> bool:
        """Whether its process is."""
        return self.process is not None and self.process.poll() is None

    @property
    def steps(self) -> int:
        """Taken so far."""
        return max(steps_of(self.folder), default=0)

    def end(self) -> None:
        """Tell it to save and leave, as a scheduler would, if it still runs; wait for that."""
        if self.process is not None and self.is_running:
            self.process.terminate()
            self.process.wait()

    def ask(self, wish: str, is_wanted: bool) -> None:
        """Touch or remove a control file, if it is there to be asked."""
        folder = self.folder / "control"
        if not is_wanted:
            (folder / wish).unlink(missing_ok=True)
        elif folder.is_dir():
            (folder / wish).touch()


def main() -> None:
    """Text, training, questions, rows and pictures."""
    started = time.monotonic()
    options, words = Options.read(sys.argv[1:])
    out = Path(options.out) / options.order
    (out / "runs").mkdir(parents=True, exist_ok=True)
    words = [
        "experiment=addition", "logging=quiet", f"data.max_digits={options.digits}",
        f"data.digit_order={options.order}",
        f"data.shards={out}/shards", f"tokenizer.path={out}/tokenizer",
        "validation.every_steps=1000000", "checkpoint.every_steps=1000000",
        "checkpoint.keep_last=1", *words,
    ]  # fmt: skip
    for kind in ("tokenizer", "build"):
        done = command(["data", kind, *words], out / f"{kind}.log", options.threads)
        if done.wait():
            raise failure(f"data {kind} failed", out / f"{kind}.log")
    print(f"{time.monotonic() - started:.0f} s: data", flush=True)
    tasks = write_tasks(out / "tasks", options)
    runs = [
        Run(name, seed, out / "runs" / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}",
            [*words, *own])
        for (name, seed), own in RUNS.items()
    ]  # fmt: skip
    try:
        train(runs, options, started)
    finally:
        for run in runs:
            run.end()
    evaluate(runs, tasks, options)
    print(f"{time.monotonic() - started:.0f} s: asked", flush=True)
    table = Path(options.into or RESULTS) / TABLES[options.order]
    write_rows(table, runs, options)
    for picture in plot(table, Path(options.into) if options.into else IMAGES):
        print(picture, flush=True)


def command(words: list[str], log: Path, threads: int) -> subprocess.Popen[bytes]:
    """A command in the background, whose words go to the end of a file."""
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "pretrain", *words],
            stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip


def failure(what: str, log: Path) -> SystemExit:
    """The end of everything, with the last words of who failed."""
    said = log.read_text(errors="replace").splitlines()[-15:]
    return SystemExit(f"{what}; the end of {log}:\n" + "\n".join(said))


def write_tasks(folder: Path, options: Options) -> list[Path]:
    """A file of items for each length; of one digit there are but 81 sums."""
    folder.mkdir(exist_ok=True)
    paths = []
    for length in range(1, options.longest + 1):
        count = min(options.items, 81 if length == 1 else options.items)
        found = make_items(length, count, seed=0, order=DigitOrder(options.order))
        paths.append(folder / f"length-{length:02}.jsonl")
        paths[-1].write_text("".join(json.dumps(record) + "\n" for record in found))
    return paths


def train(runs: list[Run], options: Options, started: float) -> None:
    """All runs side by side, at equal steps; the rate falls in a second life."""
    for run in runs:
        run.start(options.threads, "run.steps=1000000", "schedule.cooldown_tokens=0")
    begin_s, rate = keep_level(runs, until=started + STOP_AT * options.seconds)
    for run in runs:
        run.ask("stop", True)
        run.ask("pause", False)
    wait(runs, until=started + END_AT * options.seconds)
    spent_s = time.monotonic() - started
    fall = max(int(SAFETY * rate * (END_AT * options.seconds - spent_s - begin_s)), LEAD)
    total = max(run.steps for run in runs) + fall
    print(
        f"{spent_s:.0f} s: {rate:.2f} steps/s, {fall} more to cool down, {total} in all", flush=True
    )
    cooldown = f"schedule.cooldown_tokens={fall * tokens_per_step(runs[0])}"
    for run in runs:
        run.start(options.threads, f"run.steps={total}", cooldown)
    wait(runs, until=started + (END_AT + 0.04) * options.seconds)
    print(f"{time.monotonic() - started:.0f} s: trained", flush=True)


def keep_level(runs: list[Run], *, until: float) -> tuple[float, float]:
    """Let nobody get far ahead; seconds to the first step, and steps per second, of the slowest."""
    began, first, least = time.monotonic(), 0.0, 0
    while time.monotonic() < until:
        for run in runs:
            if not run.is_running:
                raise failure(f"{run.name}, seed {run.seed} has ended", run.log)
        steps = [run.steps for run in runs]
        least = min(steps)
        if least and not first:
            first = time.monotonic()
        for run, taken in zip(runs, steps, strict=True):
            run.ask("pause", taken > least + LEAD)
        time.sleep(1)
    if not first:
        raise SystemExit("no step in time; give more seconds, or see the logs of the runs.")
    return first - began, least / (time.monotonic() - first)


def wait(runs: list[Run], *, until: float) -> None:
    """For all to end; who has not by then saves and leaves."""
    while any(run.is_running for run in runs) and time.monotonic() < until:
        time.sleep(0.5)
    for run in runs:
        if run.is_running:
            print(f"{run.name}, seed {run.seed} is late", flush=True)
            run.ask("stop", True)
    for run in runs:
        assert run.process is not None
        if run.process.wait() not in (EXIT_FINISHED, EXIT_SAVED_ON_SIGNAL):
            raise failure(f"{run.name}, seed {run.seed} failed", run.log)


def tokens_per_step(run: Run) -> int:
    """Of the run's configuration."""
    return thaw(run.folder).batch.global_tokens


def evaluate(runs: list[Run], tasks: list[Path], options: Options) -> None:
    """`pretrain evaluate` of all runs, side by side."""
    depths = f"evaluate.depths={list(DEPTHS)}".replace(" ", "")
    files = f"evaluate.tasks=[{','.join(map(str, tasks))}]"
    processes = [
        command(["evaluate", f"run.dir={run.folder}", depths, files],
                run.log, options.threads)
        for run in runs
    ]  # fmt: skip
    for run, process in zip(runs, processes, strict=True):
        if process.wait():
            raise failure(f"{run.name}, seed {run.seed} was not measured", run.log)


def write_rows(path: Path, runs: list[Run], options: Options) -> None:
    """One row for every run, length and depth."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for run in runs:
        last, record = max(steps_of(run.folder).items())
        about = {
            "order": options.order, "run": run.name, "seed": run.seed,
            "trained_digits": options.digits, "steps": last, "tokens": record["tokens"],
            "loss_nats": round(record["loss/nats"], 5), "device": card(),
            "commit": commit(),
        }  # fmt: skip
        for file in sorted((run.folder / f"evaluation/step-{last:010d}").glob("length-*.json")):
            found = json.loads(file.read_text())
            exact, tokens = (found["scores"][n] for n in ("exact_match", "token_accuracy"))
            for at, depth in enumerate(found["depths"]):
                rows.append({
                    **about, "length": int(file.stem.removeprefix("length-")), "depth": depth,
                    "accuracy": round(exact["value"][at], 5), "n": found["items"],
                    "standard_error": round(exact["standard_error"][at], 5),
                    "token_accuracy": round(tokens["value"][at], 5),
                })  # fmt: skip
    with path.open("w", newline="") as table:
        writer = csv.DictWriter(table, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
