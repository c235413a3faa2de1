"""`--multirun`: every combination of swept values, one clean process after the other.

    pretrain plan --multirun cluster.nodes=8,16,32
    pretrain train -m optimizer.learning_rate=1e-3,2e-3 run.name='lr-${optimizer.learning_rate}'

Hydra would run all jobs in one process, where process groups and DeepSpeed start only once.
"""

import itertools
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

from pretrain.compose import load, parse_overrides
from pretrain.errors import EXIT_FINISHED, EXIT_SAVED_ON_SIGNAL, ConfigError

log = logging.getLogger(__name__)

_FORWARDED = (signal.SIGTERM, signal.SIGUSR1)


def run_jobs(words: str, primary: str, overrides: Sequence[str]) -> int:
    """Run the command `words` once for each combination; the largest exit code.

    All jobs are checked before the first one starts. After a signal, or one that was asked to save
    and stop, no other starts, and the code is not 0 if some are left. Raises ConfigError.
    """
    jobs = combinations(overrides)
    _check(words, primary, jobs)
    failed: list[str] = []
    code = EXIT_FINISHED
    with _Forwarding() as signals:
        for number, job in enumerate(jobs, start=1):
            log.info("job %d of %d: %s %s", number, len(jobs), words, " ".join(job))
            own = signals.run([sys.executable, "-m", "pretrain", *words.split(), *job])
            if own == EXIT_SAVED_ON_SIGNAL or (signals.came and number < len(jobs)):
                log.warning("told to stop: the sweep ends at job %d of %d", number, len(jobs))
                return own or EXIT_SAVED_ON_SIGNAL
            code = max(code, own)
            if own != EXIT_FINISHED:
                failed.append(f"job {number} with {own} ({' '.join(job)})")
    if failed:
        log.error("%d of %d jobs failed: %s", len(failed), len(jobs), "; ".join(failed))
    return code


def combinations(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each job; the last sweep varies fastest. Raises ConfigError."""
    choices: list[list[str]] = []
    for override in parse_overrides(overrides):
        text = str(override.input_line)
        if override.key_or_group.startswith("hydra"):
            raise ConfigError(
                f"{text} has no effect with --multirun: its jobs run here, one after the other."
            )
        if not override.is_sweep_override():
            choices.append([text])
        elif override.is_discrete_sweep():
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            raise ConfigError(f"{text} names no values; give them one by one: key=1,2,3.")
    return [list(job) for job in itertools.product(*choices)]


def _check(words: str, primary: str, jobs: list[list[str]]) -> None:
    if int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        raise ConfigError(
            "--multirun starts its jobs one after the other on one process each; start or submit "
            "each run of several ranks by itself."
        )
    configs = [load(primary, job, resumes=words == "train") for job in jobs]
    if words == "train":
        refuse_shared_folders([config.run.dir for config in configs])


def refuse_shared_folders(folders: Sequence[str]) -> None:
    """Raise ConfigError if two jobs of a sweep would train in one run folder."""
    twice = next((folder for folder in folders if folders.count(folder) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"{folders.count(twice)} of {len(folders)} jobs would train in run.dir={twice}. Let "
            "the swept value name the run: run.name='lr-${optimizer.learning_rate}'."
        )


class _Forwarding:
    """While entered, our signals go to the job that runs; a terminal sends it Ctrl-C by itself."""

    def __init__(self) -> None:
        self.came = False
        """Whether there was a signal."""
        self._process: subprocess.Popen[bytes] | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "_Forwarding":
        for number in (signal.SIGINT, *_FORWARDED):
            self._previous[number] = signal.signal(number, self._forward)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def run(self, command: list[str]) -> int:
        """The exit code of a job, as a shell says it: 128 + signal."""
        self._process = subprocess.Popen(command)
        if self.came:
            # before there was a process that could get it
            self._process.terminate()
        code = self._process.wait()
        return code if code >= 0 else 128 - code

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        if self._process is not None and number in _FORWARDED:
            self._process.send_signal(number)
