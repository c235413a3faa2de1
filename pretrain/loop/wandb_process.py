"""The process that speaks to W&B, so that nothing in that library can touch training.

Run by `wandb_sink`, never imported by it. Standard input has one JSON object a line: first
{"mode", "run", "config", "finish_timeout_s"}, then messages as `sink` makes them ({"record",
"histograms", "tables", "texts"} or {"alert"}), at last {"finish": exit code}; the input's end
without `finish` means that training was killed. Each line on standard output is a JSON object
{"level", "message"} that the sink logs.
"""

import json
import logging
import math
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any, Literal, TextIO, cast

import wandb

# W&B adds about ten seconds of its own: a lost network is known in the first half minute.
_INIT_TIMEOUT_S = 15.0
# As metrics.jsonl spells them.
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def main() -> None:
    """Starts a run, logs what arrives, finishes it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        # Signals for the job are for training; this process ends with its input.
        signal.signal(number, signal.SIG_IGN)
    # What W&B prints belongs in the log beside its files, which is standard error.
    reports = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stderr = cast(TextIO, _Masked(sys.stderr))
    run = _start_run(json.loads(sys.stdin.readline()), reports)
    run.define_metric("*", step_metric="tokens")
    exit_code = 1
    for line in sys.stdin:
        message = json.loads(line)
        if "finish" in message:
            exit_code = message["finish"]
            break
        if "alert" in message:
            run.alert(**message["alert"], level="WARN")
        else:
            run.log(_logged(message))
    run.finish(exit_code=exit_code)


def _logged(message: dict[str, Any]) -> dict[str, Any]:
    """What W&B charts: numbers, histograms, and tables by column."""
    logged = {key: NON_FINITE.get(value, value) for key, value in message["record"].items()}
    for name, given in message.get("histograms", {}).items():
        logged[name] = wandb.Histogram(np_histogram=(given["counts"], given["edges"]))
    for name, columns in message.get("tables", {}).items():
        rows = [
            [NON_FINITE.get(cell, cell) for cell in row]
            for row in zip(*columns.values(), strict=True)
        ]
        logged[name] = wandb.Table(columns=list(columns), data=rows)
    for name, texts in message.get("texts", {}).items():
        rows = [list(text.values()) for text in texts]
        logged[name] = wandb.Table(columns=list(texts[0]), data=rows)
    return logged


class _Masked:
    """A stream that masks secrets: W&B says the address it speaks to, with any password in it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        # by path: this package need not be importable here
        secrets = runpy.run_path(str(Path(__file__).parents[1] / "secrets.py"))
        self._redact, self._values = secrets["redact"], secrets["secret_values"](os.environ)

    def write(self, text: str) -> int:
        return self._stream.write(self._redact(text, self._values))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _start_run(start: dict[str, Any], reports: TextIO) -> wandb.Run:
    """An online run if asked for and possible, else an offline one."""
    # It is in start["mode"] already, and W&B refuses one that it cannot read, even if empty.
    os.environ.pop("WANDB_MODE", None)
    if start["mode"] == "online":
        try:
            run = _init(start, "online")
        except Exception as error:
            _report(
                reports,
                logging.WARNING,
                f"W&B cannot be reached ({error}); this life is recorded offline.",
            )
        else:
            _report(reports, logging.INFO, f"W&B run: {run.url}")
            return run
        # Its service keeps the id of the run that failed to start.
        wandb.teardown()
    run = _init(start, "offline")
    _report(reports, logging.INFO, f"W&B offline run: {run.settings.sync_dir}")
    return run


def _init(start: dict[str, Any], mode: Literal["online", "offline"]) -> wandb.Run:
    settings = wandb.Settings(
        console="off",
        silent=True,
        disable_code=True,
        save_code=False,
        disable_git=True,
        disable_job_creation=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        init_timeout=_INIT_TIMEOUT_S,
        finish_timeout=start["finish_timeout_s"],
    )
    # Offline there is nothing to resume; the id alone joins the lives when they are uploaded.
    return wandb.init(
        mode=mode,
        config=start["config"],
        # Another life may have another job, and a configuration that a resume may change.
        allow_val_change=True,
        resume="allow" if mode == "online" else None,
        settings=settings,
        **start["run"],
    )


def _report(reports: TextIO, level: int, message: str) -> None:
    reports.write(json.dumps({"level": level, "message": " ".join(message.split())}) + "\n")


if __name__ == "__main__":
    main()
