"""Tokens per second of whole forward and backward passes, path against path, on one GPU.

    python kernels/benchmarks/step.py paths=reference,compiled,fused,fused+fp8 rows=1,2 seconds=20
    python kernels/benchmarks/step.py presets=huginn-100m rows=1,2,3,4,8 seconds=10
    python kernels/benchmarks/step.py paths=fused without=norm_chain,qk_rope,swiglu

Every path is first compared with the plain modules in float32 on fresh random tokens (step_parity);
no speed of a path that fails is printed, and the program ends with 1. One row per measurement goes
to results/step.csv. What is timed is `nats.backward()` of the whole model at (no_grad, with_grad)
iterations in every row, without an optimizer, sustained: the clock falls as the card gets hot.

`without` names ops that run as their plain references, one at a time, on the fused paths, each
under the same check; two measurements with all kernels enclose them, so that a card that grows hot
does not count for or against a kernel. Those rows go to results/ablation.csv.

`held=N` compares, N times in turn, passes that quantize weights anew with passes of one optimizer
step, which share the float8 copies of the first (fixed_weights). Rows go to results/held.csv.
"""

import dataclasses
import gc
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from measurements import RESULTS, append, card, commit
from pretrain.compose import load
from pretrain.model.config import ComputePath, ModelConfig, ProductPrecision
from pretrain.model.cost import TokenFlops
from pretrain.model.depth import Depth
from pretrain.model.fixed import fixed_weights
from pretrain.model.init import initialize
from pretrain.model.recurrent import RecurrentModel
from pretrain_kernels.dispatch import OFF, switched_off
from step_parity import check_path, compare_prefix
from step_profile import profile_step

PRECISIONS = {"": "bf16", "fp8": "fp8-prefix", "fp8-all": "fp8"}
PEAK_FLOPS = 989.4e12
"""Datasheet, dense bf16, of H100 SXM and H200."""
OPTIONS = {
    "presets": "huginn-3.5b", "paths": "reference,compiled,fused,fused+fp8,fused+fp8-all",
    "rows": "1", "seconds": "20", "no_grad": "24", "with_grad": "8", "kept": "", "profile": "",
    "parity": "1", "depths": "", "without": "", "held": "0", "device": "cuda",
    "results": str(RESULTS),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is asked for."""

    presets: list[str]
    paths: list[str]
    """As compute path + precision: fused+fp8."""
    rows: list[int]
    seconds: float
    """Of every measurement."""
    depth: Depth
    kept: int | None
    """Iterations that keep their intermediate results; None: all."""
    profile: list[str]
    """Paths whose kernels are listed."""
    checks: bool
    depths: list[Depth]
    """Measured at one row besides `depth`, a quarter of the time each."""
    without: list[str]
    held: int
    """Pairs of measurements with float8 copies made anew and held."""
    device: torch.device
    """cpu is for tests of this program: such a speed says nothing."""
    results: Path

    @staticmethod
    def of(words: list[str]) -> "Plan":
        """From words KEY=VALUE; SystemExit where one means nothing."""
        options = dict(OPTIONS)
        for word in words:
            key, _, value = word.partition("=")
            if key not in options:
                raise SystemExit(f"{word} is no option; there are {', '.join(options)}.")
            options[key] = value
        listed = {
            key: [part for part in value.split(",") if part] for key, value in options.items()
        }
        try:
            switched_off(options["without"])
        except ValueError as error:
            raise SystemExit(str(error).replace(OFF, "without")) from None
        if listed["without"] and not any(path.startswith("fused") for path in listed["paths"]):
            raise SystemExit(
                f"without={options['without']} asks for a fused path, which has kernels to go "
                f"without, and paths={options['paths']} has none."
            )
        if int(options["held"]) and not all("+" in path for path in listed["paths"]):
            raise SystemExit(
                f"held={options['held']} asks for paths with float8, as fused+fp8, and "
                f"paths={options['paths']} has others."
            )
        if options["device"] == "cuda" and not torch.cuda.is_available():
            raise SystemExit("torch sees no GPU here, and the speed of a step is measured on one.")
        return Plan(
            presets=listed["presets"], paths=listed["paths"], rows=list(map(int, listed["rows"])),
            seconds=float(options["seconds"]),
            depth=Depth(int(options["no_grad"]), int(options["with_grad"])),
            kept=int(options["kept"]) if options["kept"] else None, profile=listed["profile"],
            checks=options["parity"] == "1",
            depths=[Depth(*map(int, pair.split("/"))) for pair in listed["depths"]],
            without=listed["without"], held=int(options["held"]),
            device=torch.device(options["device"]), results=Path(options["results"]),
        )  # fmt: skip


def main(words: list[str]) -> int:
    """Check, then measure, every path at every number of rows; 1 if a path failed its check."""
    plan = Plan.of(words)
    plan.results.mkdir(parents=True, exist_ok=True)
    outcomes = [
        bench(plan, experiment(preset), path) for preset in plan.presets for path in plan.paths
    ]
    return 0 if all(outcomes) else 1


def experiment(preset: str) -> ModelConfig:
    """The model of an experiment, or of the defaults."""
    words = [] if preset == "tiny" else [f"experiment={preset}"]
    return load("train", words, resumes=False).model


def bench(plan: Plan, config: ModelConfig, path: str) -> bool:
    """All measurements of a path; whether it passed its check, and without each op as well."""
    if not passes(plan, of(config, path)):
        return False
    wanted = plan.without if path.startswith("fused") else []
    without = []
    for op in wanted:
        with switched(op):
            without += [op] if passes(plan, of(config, path), f"-without-{op}") else []
    model = build(of(config, path), plan.device)
    model.kept_iterations = plan.kept
    if "+" in path and plan.checks:
        compare_prefix(of(config, "fused"), of(config, path), model, plan.results)
    for rows in plan.rows:
        try:
            measure_rows(plan, model, path, rows, without)
        except torch.cuda.OutOfMemoryError as error:
            print(f"{path}, {rows} rows: {str(error).splitlines()[0]}", flush=True)
        model.zero_grad(set_to_none=True)
        tidy()
    for depth in plan.depths:
        row = measure(model, path, depth, 1, plan.seconds / 4)
        append(plan.results / "step.csv", row)
    del model
    tidy()
    return without == wanted


def passes(plan: Plan, config: ModelConfig, tag: str = "") -> bool:
    """Whether a path's gradients are as exact as they must be, if that is to be checked."""
    return not plan.checks or check_path(config, plan.device, plan.results, tag)


def measure_rows(
    plan: Plan, model: RecurrentModel, path: str, rows: int, without: list[str]
) -> None:
    """Measure, profile, and measure without each op, at one number of rows."""
    before = measure(model, path, plan.depth, rows, plan.seconds)
    append(plan.results / "step.csv", before)
    if path in plan.profile:
        file = plan.results / f"step-profile-{path.replace('+', '-')}-{rows}.csv"
        profile_step(Step(model, rows, plan.depth), file)
    for _ in range(plan.held):
        for copies, context in (("anew", nullcontext()), ("held", fixed_weights(model))):
            with context:
                row = measure(model, path, plan.depth, rows, plan.seconds)
            append(plan.results / "held.csv", row | {"copies": copies})
    if not without:
        return
    found = []
    for op in without:
        with switched(op):
            print(f"without {op}:", flush=True)
            found.append(measure(model, path, plan.depth, rows, plan.seconds) | {"without": op})
    after = measure(model, path, plan.depth, rows, plan.seconds)
    append(plan.results / "step.csv", after)
    for row in ablation(before, found, after):
        append(plan.results / "ablation.csv", row)


def ablation(
    before: dict[str, Any], found: list[dict[str, Any]], after: dict[str, Any]
) -> list[dict[str, Any]]:
    """The rows with their share of the speed with all kernels, the mean of before and after."""
    columns = (
        "preset", "path", "precision", "without", "rows", "no_grad", "with_grad",
        "tokens_per_s_per_gpu", "sustained_s", "peak_bytes", "gpu", "torch", "commit",
    )  # fmt: skip
    rate = "tokens_per_s_per_gpu"
    whole = (before[rate] + after[rate]) / 2
    rows = [before | {"without": ""}, *found, after | {"without": ""}]
    return [
        {key: row[key] for key in columns} | {"share_of_all_kernels": round(row[rate] / whole, 4)}
        for row in rows
    ]


@contextmanager
def switched(op: str) -> Iterator[None]:
    """An op runs as its reference meanwhile."""
    previous = os.environ.get(OFF)
    os.environ[OFF] = op
    try:
        yield
    finally:
        if previous is None:
            del os.environ[OFF]
        else:
            os.environ[OFF] = previous


def of(config: ModelConfig, path: str) -> ModelConfig:
    """The model's configuration on a path as it is named here."""
    name, _, precision = path.partition("+")
    return dataclasses.replace(
        config,
        path=ComputePath(name),
        no_grad_precision=ProductPrecision.fp8 if precision else ProductPrecision.same,
        grad_precision=ProductPrecision("fp8" if precision == "fp8-all" else "same"),
    )


def build(config: ModelConfig, device: torch.device) -> RecurrentModel:
    """The model in bf16 with its initial weights."""
    started = time.monotonic()
    with device:
        model = RecurrentModel(config)
    initialize(model, mean_depth=32, seed=int(time.time()))
    model.to(torch.bfloat16)
    wait(device)
    print(f"{config.path.value}: built in {time.monotonic() - started:.1f} s", flush=True)
    return model


class Step:
    """One forward and backward pass of random rows."""

    def __init__(self, model: RecurrentModel, rows: int, depth: Depth) -> None:
        config, device = model.config, next(model.parameters()).device
        self.model, self.depths = model, [depth] * rows
        tokens = torch.randint(config.vocabulary_size, (rows, config.context + 1), device=device)
        self.tokens, self.labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        shape = (rows, config.context, config.width)
        self.state = torch.randn(shape, device=device, dtype=torch.bfloat16) * config.state_sigma

    def __call__(self) -> torch.Tensor:
        """The nats; gradients are replaced."""
        self.model.zero_grad(set_to_none=True)
        output = self.model(
            self.tokens, self.depths, initial_state=self.state, labels=self.labels,
            keep_logits=False,
        )  # fmt: skip
        assert output.nats is not None
        output.nats.backward()
        return output.nats.detach()


def measure(
    model: RecurrentModel, path: str, depth: Depth, rows: int, seconds: float
) -> dict[str, Any]:
    """Run for so long; printed, and given as a row of step.csv."""
    step, config = Step(model, rows, depth), model.config
    device = step.tokens.device
    for _ in range(2):
        step()
    wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, started = [], time.perf_counter()
    while not times or time.perf_counter() - started < seconds:
        before = time.perf_counter()
        nats = step()
        wait(device)
        times.append(time.perf_counter() - before)
    assert torch.isfinite(nats)
    tokens = rows * config.context
    rate = tokens * len(times) / sum(times)
    flops = rate * TokenFlops.of(config).model(depth.no_grad, depth.with_grad)
    early = [t for t, at in zip(times, range(len(times)), strict=True) if sum(times[:at]) < 1]
    name, _, precision = path.partition("+")
    row = {
        "preset": config.name, "path": name, "precision": PRECISIONS[precision],
        "rows": rows, "gpus": 1, "zero": 0, "accumulation": 1,
        "tokens_per_s_per_gpu": round(rate, 1), "sustained_s": round(sum(times), 1),
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
        "gpu": card(), "torch": torch.__version__,
        "commit": commit(),
        "no_grad": depth.no_grad, "with_grad": depth.with_grad,
        "kept_iterations": "" if model.kept_iterations is None else model.kept_iterations,
        "first_second_tokens_per_s": round(tokens / statistics.mean(early), 1),
        "model_tflops_per_s": round(flops / 1e12, 1),
    }  # fmt: skip
    print(
        f"{config.name} {path:10} {rows} rows ({depth.no_grad}, {depth.with_grad}): {rate:8,.0f} "
        f"tokens/s over {row['sustained_s']} s (first second "
        f"{row['first_second_tokens_per_s']:,.0f}), {flops / 1e12:.0f} TFLOP/s, "
        f"MFU {flops / PEAK_FLOPS:.1%}, {row['peak_bytes'] / 1e9:.1f} GB",
        flush=True,
    )
    return row


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def tidy() -> None:
    """Give memory back that nothing refers to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
