"""Does it learn, and does depth help: runs of some minutes side by side on one GPU, on real shards.

    python kernels/benchmarks/learning.py runs=main seconds=580 data=files data.root=x data.name=x \
        tokenizer.path=... data.shards=...
    python kernels/benchmarks/learning.py runs=sampling seconds=300 data=files ...

`runs` names runs or groups of learning_runs.py. Without `tokens`, a probe of all of them side by
side says how many tokens each can have in `seconds`, which are those of the whole command. Then
they train; their held-out loss is measured by depth on `rows` rows, and scores on the files of
`tasks=a.jsonl,b.jsonl`, of `items` items each; and what depths add to the noise of the gradient, by
`draws` drawings (depth_noise.py). All other words are overrides of every run. A command that ran
out of time is given again and goes on. Runs are kept below `folder`. Tables are learning*.csv below
`results`, in which each run's rows replace those it had; learning_plots.py draws them.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from learning_results import write_results
from learning_runs import Run, all_runs, is_fixed, named, overrides_of
from measurements import RESULTS
from pretrain.compose import load
from pretrain.errors import EXIT_FINISHED, EXIT_SAVED_ON_SIGNAL
from reliability import steps

HERE = Path(__file__).parent
# for held-out losses, tasks and noise, behind the training; less where there is little time
AFTER_S = 90.0
# Of the time that a probe leaves, for training: the rest is for validations, saving, and a probe
# that was too fast. Starting again takes about so much of what the probe took, which compiled.
CAUTION, WARM_START = 0.9, 0.6
PROBE_STEPS = 12
PROBE_TOKENS = 1_000_000_000
# to save and leave
GRACE_S = 40.0


@dataclass(slots=True)
class Options:
    """What the command line says."""

    runs: str = "main"
    seconds: float = 580.0
    tokens: int = 0
    rows: int = 256
    tasks: str = ""
    items: int = 200
    draws: int = 16
    folder: Path = Path("out/learning")
    results: Path = RESULTS
    words: list[str] = field(default_factory=list)


def parse(words: Sequence[str]) -> Options:
    """`name=value` of the options; what names none of them is an override of the runs."""
    options = Options()
    kinds = {"seconds": float, "tokens": int, "rows": int, "items": int, "draws": int,
             "runs": str, "tasks": str, "folder": Path, "results": Path}  # fmt: skip
    for word in words:
        name, _, value = word.partition("=")
        if name in kinds:
            setattr(options, name, kinds[name](value))
        else:
            options.words.append(word)
    return options


class Learning:
    """Some runs, their folders and logs, and the time that is left for them."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.deadline = time.monotonic() + options.seconds
        self.train_until = self.deadline - min(AFTER_S, 0.3 * options.seconds)
        runs = all_runs(options.words)
        self.runs: dict[str, Run] = {name: runs[name] for name in named(options.runs, runs)}
        options.folder.mkdir(parents=True, exist_ok=True)

    def folder(self, name: str) -> Path:
        """Of a run."""
        return self.options.folder / name

    def start(self, name: str, arguments: Sequence[object]) -> subprocess.Popen[bytes]:
        """A Python program in the background, its output at the end of a log."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.log(name).open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *map(str, arguments)], stdout=log, stderr=log, env=environment
            )

    def log(self, name: str) -> Path:
        """Of a program."""
        return self.options.folder / f"{name}.log"

    def end_of_log(self, name: str) -> str:
        """What a program said last."""
        return f"\n{self.log(name).read_text(errors='replace')[-1500:]}"

    def overrides(self, name: str, tokens: int) -> list[str]:
        """All words of `pretrain train` for a run."""
        return overrides_of(self.runs[name], tokens=tokens, words=self.options.words)

    def tokens(self) -> int:
        """Of every run: as given, as in an earlier command, or as a probe finds."""
        if self.options.tokens:
            return self.options.tokens
        for name in self.runs:
            if (self.folder(name) / "config.yaml").exists():
                return int(self.config_of(name).total_tokens)
        return self.probe()

    def config_of(self, name: str) -> Any:
        """As the run's folder has it."""
        return load("train", [f"run.dir={self.folder(name)}"], resumes=True)

    def probe(self) -> int:
        """Tokens for every run in the time that is left, by the slowest when all of them run."""
        folders = {name: self.folder(f"probe-{name}") for name in self.runs}
        started = time.monotonic()
        processes = {
            name: self.start(f"probe-{name}", ["-m", "pretrain", "train", f"run.dir={folder}",
                                               *self.overrides(name, PROBE_TOKENS)])
            for name, folder in folders.items()
        }  # fmt: skip
        try:
            self.wait_for_steps(processes, 1)
            start_s = time.monotonic() - started
            self.wait_for_steps(processes, PROBE_STEPS)
        finally:
            # nothing of it is kept, so nothing need be saved
            for process in processes.values():
                process.kill()
                process.wait()
        batch = load("train", self.overrides(next(iter(self.runs)), PROBE_TOKENS)).batch
        slowest_s = 0.0
        for name, folder in folders.items():
            # the later half, when all are there
            last = sorted(steps(folder).items())[-PROBE_STEPS // 2 :]
            step_s = sum(record["speed/step_s"] for _, record in last) / len(last)
            slowest_s = max(slowest_s, step_s)
            print(f"{name}: {batch.global_tokens / step_s:,.0f} tokens/s beside the others")
        left_s = self.train_until - time.monotonic()
        count = int(CAUTION * (left_s - min(WARM_START * start_s, left_s / 2)) / slowest_s)
        return max(count, 1) * int(batch.global_tokens)

    def wait_for_steps(self, processes: dict[str, subprocess.Popen[bytes]], count: int) -> None:
        """Until every probe has taken so many. Raises SystemExit if one ends, or time is over."""
        while any(len(steps(self.folder(f"probe-{name}"))) < count for name in processes):
            time.sleep(0.2)
            dead = [name for name, process in processes.items() if process.poll() is not None]
            if dead or time.monotonic() > self.train_until:
                ends = "".join(self.end_of_log(f"probe-{name}") for name in dead or processes)
                raise SystemExit(f"The probe takes no {count} steps in its time:{ends}")

    def train(self, tokens: int) -> None:
        """All runs side by side, to their ends, or to a save when the time is over."""
        processes = {
            name: self.start(name, ["-m", "pretrain", "train", f"run.dir={self.folder(name)}",
                                    *self.overrides(name, tokens)])
            for name in self.runs if not self.is_finished(name)
        }  # fmt: skip
        said = time.monotonic()
        while any(p.poll() is None for p in processes.values()) and said < self.train_until:
            time.sleep(0.5)
            if time.monotonic() > min(said + 30, self.train_until):
                said = time.monotonic()
                print(f"{self.train_until - said:.0f} s left: {self.progress()}", flush=True)
        for process in processes.values():
            if process.poll() is None:
                process.terminate()
        until = time.monotonic() + GRACE_S
        for name, process in processes.items():
            self.finish(name, process, until)

    def progress(self) -> str:
        """The last step of each run and its loss."""
        found = {name: steps(self.folder(name)) for name in self.runs}
        return ", ".join(
            f"{name} at {max(own)}: {own[max(own)]['loss/nats']:.3f}"
            for name, own in found.items() if own
        )  # fmt: skip

    def is_finished(self, name: str) -> bool:
        """Whether the run's last step is saved."""
        latest = self.folder(name) / "checkpoints/latest"
        if not latest.exists():
            return False
        return latest.read_text().strip() == f"step-{self.config_of(name).total_steps:010d}"

    def finish(self, name: str, process: subprocess.Popen[bytes], until: float) -> None:
        """Wait for a program, at most until then; say what went wrong."""
        try:
            code = process.wait(max(until - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        if code not in (EXIT_FINISHED, EXIT_SAVED_ON_SIGNAL):
            print(f"{name}: exit code {code}{self.end_of_log(name)}", flush=True)

    def evaluate(self, names: Sequence[str]) -> None:
        """Held-out loss of runs by depth, and scores on the tasks, all side by side."""
        options = self.options
        kinds = {"held-out": [f"evaluate.rows={options.rows}"]}
        if options.tasks:
            kinds["tasks"] = [f"evaluate.tasks=[{options.tasks}]",
                              f"evaluate.items={options.items}"]  # fmt: skip
        processes = {}
        for name in names:
            depths = ",".join(map(str, self.runs[name].depths))
            for kind, words in kinds.items():
                told = [*words, f"run.dir={self.folder(name)}", f"evaluate.depths=[{depths}]"]
                processes[f"{name}-{kind}"] = self.start(
                    f"{name}-{kind}", ["-m", "pretrain", "evaluate", *told]
                )
        for name, process in processes.items():
            self.finish(name, process, self.deadline)

    def measure_noise(self, name: str) -> None:
        """What depths add to the noise of the gradient, alone on the GPU, since it is timed."""
        words = [f"run.dir={self.folder(name)}", f"draws={self.options.draws}",
                 f"results={self.options.results}"]  # fmt: skip
        process = self.start(f"{name}-noise", [HERE / "depth_noise.py", *words])
        self.finish(f"{name}-noise", process, self.deadline)


def main(words: Sequence[str]) -> None:
    """Train what is named, measure it, write the tables. Raises SystemExit if some are behind."""
    learning = Learning(parse(words))
    options, runs = learning.options, learning.runs
    tokens = learning.tokens()
    print(f"tokens={tokens} for each of {', '.join(runs)}", flush=True)
    learning.train(tokens)
    finished = [name for name in runs if learning.is_finished(name)]
    learning.evaluate(finished)
    deep = [name for name in finished if not is_fixed(runs[name])]
    if deep and options.draws:
        learning.measure_noise(deep[0])
    write_results({name: learning.folder(name) for name in runs}, options.results)
    if missing := [name for name in runs if name not in finished]:
        raise SystemExit(
            f"Not finished: {', '.join(missing)}. Give the same command again; what they say is in "
            f"{options.folder}/NAME.log."
        )


if __name__ == "__main__":
    main(sys.argv[1:])
