"""What keeping a run alive costs on GPUs: saves beside training, kills and resumes, determinism.

Every part is real runs of `pretrain train` in processes of their own, on shards that were built
before; one row per measurement goes to results/reliability.csv. On one GPU:

    python kernels/benchmarks/reliability.py draws deterministic save data=files data.root=x ...

and on several: `zero`, ZeRO 1, 2 and 3 against one GPU; `elastic`, a run that is killed and goes on
under other stages on fewer of them. Overrides are given to every run.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from measurements import RESULTS, append, card, commit

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("out/reliability")
# lives that threads follow end with the program
interrupted = threading.Event()
SMALL = [
    "experiment=huginn-100m", "batch.global_tokens=65536", "batch.micro_rows=4",
    "schedule.warmup_tokens=0", "run.steps=12", "+checkpoint.tags.half=6",
    "checkpoint.every_steps=1000", "validation.every_steps=1000", "validation.rows=16",
    "validation.depths=[1,32]",
]  # fmt: skip
LARGE = [
    "experiment=huginn-3.5b", "batch.global_tokens=32768", "schedule.warmup_tokens=0",
    "checkpoint.every_steps=1000", "validation.every_steps=1000", "validation.rows=4",
    "run.tokens=null",
    "validation.depths=[1,32]", "checkpoint.keep_last=1",
]  # fmt: skip


def report(part: str, what: str, value: Any, unit: str, gpus: int = 1) -> None:
    """One row."""
    row = {
        "part": part, "what": what, "value": value, "unit": unit, "gpus": gpus, "gpu": card(),
        "torch": torch.__version__, "commit": commit(),
    }  # fmt: skip
    append(RESULTS / "reliability.csv", row)
    print(f"{part}: {what}: {value} {unit}", flush=True)


def train(
    name: str,
    arguments: list[str],
    *,
    gpus: int = 1,
    until: Callable[[Path], bool] | None = None,
    folder: Path = FOLDER,
    environment: Mapping[str, str] | None = None,
) -> Path:
    """One life of a run, killed as soon as `until` holds; its folder. NAME.log beside it has what
    it said. Relative paths mean what they mean here, on any number of GPUs.
    """
    run_dir = folder / name
    if until is not None and until(run_dir):
        print(f"{name}: is there already", flush=True)
        return run_dir
    command = [sys.executable, "-m", "pretrain", "train"]
    if gpus > 1:
        # not torchrun: its ranks are in sessions of their own, and outlive it for a while
        command = [str(ROOT / "launch/plain.sh"), str(gpus)]
    command += [*arguments, f"run.dir={run_dir}", "logging=quiet"]
    environment = {
        **os.environ, "PRETRAIN_PYTHON": sys.executable, "PRETRAIN_WORKDIR": str(Path.cwd()),
        **(environment or {}),
    }  # fmt: skip
    started = time.monotonic()
    with (folder / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env=environment
        )
        try:
            while process.poll() is None and not (until is not None and until(run_dir)):
                if interrupted.is_set():
                    sys.exit(130)
                time.sleep(0.2)
        finally:
            # also after Ctrl-C, which goes to our session alone
            if process.poll() is None:
                os.killpg(process.pid, 9)
        process.wait()
    print(f"{name}: {process.returncode} after {time.monotonic() - started:.0f} s", flush=True)
    return run_dir


def records(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of a record."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def steps(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Records of steps."""
    return {record["step"]: record for record in records(run_dir) if "loss/nats" in record}


def has(step: int) -> Callable[[Path], bool]:
    """Whether a run has recorded a step."""
    return lambda run_dir: step in steps(run_dir)


def hashes(run_dir: Path, step: int) -> list[str]:
    """Of the files of weights and moments."""
    manifest = json.loads((run_dir / f"checkpoints/step-{step:010d}/manifest.json").read_text())
    files = sorted(manifest["files"].items())
    return [entry["sha256"] for name, entry in files if name.endswith(".safetensors")]


def tokens_per_s(run_dir: Path, first: int, last: int) -> float:
    """Over steps that begin after `first`."""
    chosen = [r for step, r in steps(run_dir).items() if first < step <= last]
    tokens = sum(r["data/rows"] for r in chosen)
    context = chosen[0]["tokens"] / chosen[0]["step"] / chosen[0]["data/rows"]
    return tokens * context / sum(r["speed/step_s"] for r in chosen)


def draws(_: list[str]) -> None:
    """Initial states and weights are the same numbers on a GPU as on a CPU."""
    from pretrain.model.config import ModelConfig
    from pretrain.model.init import initialize
    from pretrain.model.initial_state import initial_states
    from pretrain.model.recurrent import RecurrentModel

    found = []
    for device in ("cpu", "cuda"):
        states = initial_states(
            [0, 1, 12345678901], seed=3, context=257, width=96, device=torch.device(device)
        )
        config = ModelConfig(
            name="draws", width=192, heads=2, inner=320, prelude_layers=1, core_layers=1,
            coda_layers=1, vocabulary_size=1031, context=64,
        )  # fmt: skip
        with torch.device(device):
            model = RecurrentModel(config)
        initialize(model, mean_depth=32, seed=5)
        found.append((states.cpu(), {n: p.detach().cpu() for n, p in model.named_parameters()}))
    (cpu_states, cpu_weights), (states, weights) = found
    report("draws", "initial states differ in", int((states != cpu_states).sum()), "elements")
    differ = sum(int((weights[name] != weight).sum()) for name, weight in cpu_weights.items())
    total = sum(weight.numel() for weight in weights.values())
    report("draws", f"initial weights differ in (of {total})", differ, "elements")
    worst = max(float((weights[n] - w).abs().max()) for n, w in cpu_weights.items())
    report("draws", "largest difference of a weight", worst, "")


def deterministic(overrides: list[str]) -> None:
    """Bitwise resume on a GPU with engine.deterministic, its cost, and the spread without it."""
    speeds = {}
    for flag in ("true", "false"):
        setting = [*SMALL, *overrides, f"engine.deterministic={flag}"]
        whole, again = train(f"whole-{flag}", setting), train(f"again-{flag}", setting)
        killed = train(f"killed-{flag}", setting, until=has(9))
        killed = train(f"killed-{flag}", [*setting, "run.steps=12"])
        speeds[flag] = tokens_per_s(whole, 3, 12)
        for name, other in (("rerun", again), ("killed and resumed", killed)):
            pairs = [
                (steps(whole)[n]["loss/nats"], steps(other)[n]["loss/nats"]) for n in range(1, 13)
            ]
            worst = max(abs(a - b) for a, b in pairs)
            report("deterministic", f"{flag}: {name}, largest difference of a loss", worst, "nats")
            is_equal = hashes(whole, 12) == hashes(other, 12)
            report(
                "deterministic", f"{flag}: {name}, weights and moments bitwise equal", is_equal, ""
            )
        report("deterministic", f"{flag}: tokens/s", round(speeds[flag]), "tokens/s")
    report("deterministic", "speed against not", round(speeds["true"] / speeds["false"], 4), "")
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)


def save(overrides: list[str]) -> None:
    """The 3.5B model: what a save beside training costs, and a resume after a kill."""
    fill_memory()
    setting = [*LARGE, *overrides]
    run_dir = train(
        "large", [*setting, "run.steps=40", "+checkpoint.tags.first=3"],
        until=lambda d: any("checkpoint/step" in r for r in records(d)) and max(steps(d)) >= 13,
    )  # fmt: skip
    (saved,) = [r for r in records(run_dir) if "checkpoint/step" in r]
    taken = steps(run_dir)
    for key, unit in (
        ("bytes", "bytes"),
        ("copied_s", "s"),
        ("written_s", "s"),
        ("blocked_s", "s"),
    ):
        report("save", f"checkpoint/{key}", saved[f"checkpoint/{key}"], unit)
    during = [n for n in taken if 3 < n <= saved["step"]]
    after = [n for n in taken if n > saved["step"]]
    report("save", "steps taken while it was written", len(during), "steps")
    speed = {
        name: sum(taken[n]["data/rows"] * 4096 * taken[n]["depth/mean"] for n in chosen)
        / sum(taken[n]["speed/step_s"] for n in chosen)
        for name, chosen in (("during", during), ("after", after))
        if chosen
    }
    for name, value in speed.items():
        report("save", f"iterations x tokens/s {name} the write", round(value), "1/s")
    started = time.monotonic()
    resumed = train("large", [*setting, "run.steps=40"], until=has_again(run_dir, 6))
    report("save", "kill to third step of the next life", round(time.monotonic() - started, 1), "s")
    again = steps(resumed)
    for number in (4, 5, 6):
        difference = abs(again[number]["loss/nats"] - taken[number]["loss/nats"])
        report("save", f"loss of step {number}, resumed against first", difference, "nats")
    shutil.rmtree(run_dir, ignore_errors=True)


def has_again(run_dir: Path, step: int) -> Callable[[Path], bool]:
    """Whether a step was recorded after the resume took it back."""
    discarded = run_dir / "metrics.discarded.jsonl"
    return lambda d: discarded.exists() and step in steps(d)


def copies(_: list[str]) -> None:
    """What a save costs training once its pinned buffers are there, and what they cost."""
    from pretrain.engine.saving import HostCopies

    pieces = [(str(i), torch.randn(1 << 28, device="cuda")) for i in range(36)]
    host = HostCopies()
    for number in range(4):
        torch.cuda.synchronize()
        started = time.monotonic()
        host.take(pieces)
        passed_s = time.monotonic() - started
        what = "first copy of 38.7 GB" if number == 0 else f"copy {number} into the same buffers"
        report("copies", what, round(passed_s, 3), "s")


def fill_memory() -> None:
    """Use the host's memory once: some virtual machines show what they have only then."""
    child = "import numpy as np\na = [np.ones(1 << 30, np.uint8) for _ in range(100)]"
    subprocess.run([sys.executable, "-c", child], check=False)


def zero(overrides: list[str]) -> None:
    """ZeRO 1, 2, 3 on all GPUs against one: speed, memory, losses; a kill, and a resume on one."""
    gpus, last = torch.cuda.device_count(), 4
    one = train("one", [*LARGE, *overrides, "run.steps=40"], gpus=1, until=has(last))
    base = tokens_per_s(one, 1, last)
    report("zero", "ZeRO-1, one GPU", round(base), "tokens/s")
    report("zero", "ZeRO-1, one GPU, peak", steps(one)[last]["memory/peak_bytes"], "bytes")
    for stage in (1, 2, 3):
        name = f"ZeRO-{stage}"
        tags = ["+checkpoint.tags.mid=3"] if stage == 3 else []
        run_dir = train(
            f"zero{stage}",
            [*LARGE, f"engine=zero{stage}-bf16", *overrides, *tags, "run.steps=40"], gpus=gpus,
            until=lambda d, is_saved=bool(tags): last in steps(d)
            and (not is_saved or any("checkpoint/step" in r for r in records(d))),
        )  # fmt: skip
        speed = tokens_per_s(run_dir, 1, last)
        report("zero", name, round(speed), "tokens/s", gpus)
        report("zero", f"{name}, of {gpus} x one GPU", round(speed / base / gpus, 4), "", gpus)
        peak = steps(run_dir)[last]["memory/peak_bytes"]
        report("zero", f"{name}, peak of a GPU", peak, "bytes", gpus)
        for n in range(1, last + 1):
            difference = abs(steps(run_dir)[n]["loss/nats"] - steps(one)[n]["loss/nats"])
            report("zero", f"{name}, loss of step {n} against one GPU", difference, "nats", gpus)
    before = steps(run_dir)
    started = time.monotonic()
    resumed = train(
        "zero3", [*LARGE, "engine=zero1-bf16", *overrides, "run.steps=40"],
        until=has_again(run_dir, last),
    )  # fmt: skip
    passed_s = round(time.monotonic() - started, 1)
    report("zero", "kill on all to the first step of ZeRO-1 on one", passed_s, "s")
    difference = abs(steps(resumed)[last]["loss/nats"] - before[last]["loss/nats"])
    report("zero", f"resumed by ZeRO-1 on one GPU, loss of step {last}", difference, "nats")


def elastic(overrides: list[str]) -> None:
    """A save by ZeRO-1 on all GPUs, a kill, and resumes side by side on half of them and on one."""
    gpus, saved, last = torch.cuda.device_count(), 3, 6
    setting = [*LARGE, *overrides, f"batch.global_tokens={8192 * gpus}", "run.steps=40"]
    run_dir = train(
        "all", [*setting, f"+checkpoint.tags.first={saved}"], gpus=gpus,
        until=lambda d: any("checkpoint/step" in r for r in records(d)) and last in steps(d),
    )  # fmt: skip
    before = steps(run_dir)
    (copied,) = [r for r in records(run_dir) if "checkpoint/step" in r]
    for key in ("bytes", "copied_s", "written_s"):
        unit = "bytes" if key == "bytes" else "s"
        report("elastic", f"checkpoint/{key}", copied[f"checkpoint/{key}"], unit, gpus)
    lives = {"half": (1, gpus // 2, "zero2-bf16"), "one": (0, 1, "zero1-bf16")}
    threads = []
    for name, (first, count, engine) in lives.items():
        # links: a checkpoint's files are never changed, what a run writes to is copied
        shutil.copytree(run_dir, FOLDER / name, copy_function=link_or_copy)
        cards = ",".join(str(first + card) for card in range(count))
        threads.append(threading.Thread(target=resume_elsewhere, args=(
            name, [*setting, f"engine={engine}"], count, cards, before, saved, last,
        )))  # fmt: skip
        threads[-1].start()
    try:
        for thread in threads:
            thread.join()
    finally:
        interrupted.set()


def link_or_copy(source: str, target: str) -> None:
    """What is large is a file of a checkpoint."""
    if Path(source).stat().st_size > 1 << 20:
        os.link(source, target)
    else:
        shutil.copy2(source, target)


def resume_elsewhere(
    name: str,
    setting: list[str],
    gpus: int,
    cards: str,
    before: dict[int, Any],
    saved: int,
    last: int,
) -> None:
    """A life on other GPUs from step `saved` to `last`, against the steps of the life before."""
    started = time.monotonic()
    run_dir = FOLDER / name
    train(
        name, setting, gpus=gpus, until=has_again(run_dir, last),
        environment={"CUDA_VISIBLE_DEVICES": cards},
    )  # fmt: skip
    passed_s = round(time.monotonic() - started, 1)
    again = steps(run_dir)
    what = f"resumed by {setting[-1]}"
    report("elastic", f"{what}, kill to step {last}", passed_s, "s", gpus)
    for number in range(saved + 1, last + 1):
        difference = abs(again[number]["loss/nats"] - before[number]["loss/nats"])
        report("elastic", f"{what}, loss of step {number}", difference, "nats", gpus)


PARTS = {
    "elastic": elastic,
    "draws": draws,
    "copies": copies,
    "deterministic": deterministic,
    "save": save,
    "zero": zero,
}


def main() -> None:
    """Run the parts that are named, with the overrides that are given."""
    parts = [word for word in sys.argv[1:] if word in PARTS]
    overrides = [word for word in sys.argv[1:] if word not in PARTS]
    if not parts:
        raise SystemExit(f"Name at least one of {', '.join(PARTS)}.")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for part in parts:
        PARTS[part](overrides)


if __name__ == "__main__":
    main()
