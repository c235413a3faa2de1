"""Tokens per second of whole forward and backward passes, path against path, on one GPU.

    python kernels/benchmarks/step.py paths=reference,compiled,fused,fused+fp8 rows=1,2 seconds=20
    python kernels/benchmarks/step.py presets=huginn-100m rows=1,2,3,4,8 seconds=10
    python kernels/benchmarks/step.py paths=fused without=norm_chain,qk_rope,swiglu

Every path is first compared with the plain modules in float32 on fresh random tokens, and float8
with bf16 at 8, 24 and 56 iterations without gradient (step_parity); no speed of a path that fails
is printed, and the program ends with 1. One row per measurement goes
to results/step.csv. What is timed is `nats.backward()` of the whole model at (no_grad, with_grad)
iterations in every row, without an optimizer, sustained: the clock falls as the card gets hot.
`depths`, at one row, tell what an iteration costs: a + b n + c k is printed with its largest
residual. What a card is too small for is said and left out.

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
from typing import Any

import torch

from measurements import append, card, check_writable, commit
from pass_times import Fit
from pretrain.compose import load
from pretrain.errors import ConfigError
from pretrain.model.config import ComputePath, ModelConfig, ProductPrecision
from pretrain.model.cost import TokenFlops
from pretrain.model.depth import Depth
from pretrain.model.fixed import fixed_weights
from pretrain.model.init import initialize
from pretrain.model.recurrent import RecurrentModel
from pretrain_kernels.dispatch import OFF
from step_parity import check_path, compare_prefix
from step_plan import Plan
from step_profile import profile_step

PRECISIONS = {"": "bf16", "fp8": "fp8-prefix", "fp8-all": "fp8"}
PEAK_FLOPS = 989.4e12
"""Datasheet, dense bf16, of H100 SXM and H200."""


def main(words: list[str]) -> int:
    """Check, then measure, every path at every number of rows; 1 if a path failed its check."""
    plan = Plan.of(words)
    # all of them before the first is measured
    wanted = [
        (path, of(experiment(preset), path)) for preset in plan.presets for path in plan.paths
    ]
    check_writable(*plan.tables)
    outcomes = [bench(plan, config, path) for path, config in wanted]
    return 0 if all(outcomes) else 1


def experiment(preset: str) -> ModelConfig:
    """The model of an experiment, or of the defaults; SystemExit if there is no such one."""
    words = [] if preset == "tiny" else [f"experiment={preset}"]
    try:
        return load("train", words, resumes=False).model
    except ConfigError as error:
        raise SystemExit(str(error)) from None


def bench(plan: Plan, config: ModelConfig, path: str) -> bool:
    """All measurements of a path; whether it passed its check, and without each op as well."""
    wanted, without = plan.without if path.startswith("fused") else [], []
    with unless_too_large(f"{config.name} {path}"):
        if not passes(plan, config):
            return False
        for op in wanted:
            with switched(op):
                without += [op] if passes(plan, config, f"-without-{op}") else []
        model = build(config, plan.device)
        model.kept_iterations = plan.kept
        if "+" in path and plan.checks:
            plain = of(config, "fused")
            if not compare_prefix(plain, config, model, plan.results):
                return False
        measure_all(plan, model, path, without)
        del model
    tidy()
    return without == wanted


def measure_all(plan: Plan, model: RecurrentModel, path: str, without: list[str]) -> None:
    """Every number of rows, then one row at every other depth, and what it takes by depth."""
    name, context = f"{model.config.name} {path}", model.config.context
    seconds: dict[tuple[int, int], float] = {}
    for rows in plan.rows:
        with unless_too_large(f"{name}, {rows} rows"):
            row = measure_rows(plan, model, path, rows, without)
            if rows == 1:
                seconds[plan.depth] = context / row["tokens_per_s_per_gpu"]
        model.zero_grad(set_to_none=True)
        tidy()
    for depth in plan.depths:
        with unless_too_large(f"{name}, 1 row, {depth.no_grad}/{depth.with_grad}"):
            row = measure(model, path, depth, 1, plan.seconds / 4)
            append(plan.results / "step.csv", row)
            seconds[depth] = context / row["tokens_per_s_per_gpu"]
        model.zero_grad(set_to_none=True)
        tidy()
    if fit := Fit.of(seconds):
        print(f"{name}: a row takes {fit}", flush=True)


@contextmanager
def unless_too_large(what: str) -> Iterator[None]:
    """A card that is too small for this ends what is inside, and nothing else."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        print(f"{what}: not measured: {str(error).splitlines()[0]}", flush=True)


def passes(plan: Plan, config: ModelConfig, tag: str = "") -> bool:
    """Whether a path's gradients are as exact as they must be, if that is to be checked."""
    return not plan.checks or check_path(config, plan.device, plan.results, tag)


def measure_rows(
    plan: Plan, model: RecurrentModel, path: str, rows: int, without: list[str]
) -> dict[str, Any]:
    """Measure, profile, and measure without each op, at one number of rows; the first row."""
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
        return before
    found = []
    for op in without:
        with switched(op):
            print(f"without {op}:", flush=True)
            found.append(measure(model, path, plan.depth, rows, plan.seconds) | {"without": op})
    after = measure(model, path, plan.depth, rows, plan.seconds)
    append(plan.results / "step.csv", after)
    for row in ablation(before, found, after):
        append(plan.results / "ablation.csv", row)
    return before


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
    all_pairs = flops + rate * pairs_nobody_sees(config, depth)
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
        f"MFU {flops / PEAK_FLOPS:.1%} ({all_pairs / PEAK_FLOPS:.1%} with all pairs of attention), "
        f"{row['peak_bytes'] / 1e9:.1f} GB",
        flush=True,
    )
    return row


def pairs_nobody_sees(config: ModelConfig, depth: Depth) -> int:
    """FLOPs of a token that are counted besides where attention counts as if it had no mask."""
    layers = 3 * (config.prelude_layers + config.coda_layers)
    layers += config.core_layers * (depth.no_grad + 3 * depth.with_grad)
    # T instead of (T + 1) / 2 keys, in two products of D multiply-adds with each
    return layers * 2 * config.width * (config.context - 1)


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
