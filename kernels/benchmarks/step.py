"""Tokens per second of whole forward and backward passes, path against path, on one GPU.

    python kernels/benchmarks/step.py paths=reference,compiled,fused,fused+fp8 rows=1,2 seconds=20

Every path is first compared with the plain modules in float32 on fresh random tokens (step_parity);
no speed of a path that fails is printed. One row per measurement goes to results/step.csv. What is
timed is `nats.backward()` of the whole model at (no_grad, with_grad) iterations in every row,
without an optimizer, sustained: the clock falls as the card gets hot.
"""

import csv
import dataclasses
import gc
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pretrain.compose import load
from pretrain.model.config import ComputePath, ModelConfig, ProductPrecision
from pretrain.model.cost import TokenFlops
from pretrain.model.depth import Depth
from pretrain.model.init import initialize
from pretrain.model.recurrent import RecurrentModel
from step_parity import check_path, compare_prefix
from step_profile import profile_step

RESULTS = Path(__file__).parent / "results"
PRECISIONS = {"": "bf16", "fp8": "fp8-prefix", "fp8-all": "fp8"}
PEAK_FLOPS = 989.4e12
"""Datasheet, dense bf16, of H100 SXM and H200."""


def main() -> None:
    """Check, then measure, every path at every number of rows."""
    options = {
        "preset": "huginn-3.5b", "paths": "reference,compiled,fused,fused+fp8,fused+fp8-all",
        "rows": "1", "seconds": "20", "no_grad": "24", "with_grad": "8", "kept": "", "profile": "",
        "parity": "1", "depths": "",
    }  # fmt: skip
    for word in sys.argv[1:]:
        key, _, value = word.partition("=")
        if key not in options:
            raise SystemExit(f"{word} is no option; there are {', '.join(options)}.")
        options[key] = value
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here, and the speed of a step is measured on one.")
    config = load("train", [f"experiment={options['preset']}"], resumes=False).model
    depth = Depth(int(options["no_grad"]), int(options["with_grad"]))
    kept = int(options["kept"]) if options["kept"] else None
    paths = options["paths"].split(",")
    good = [path for path in paths if options["parity"] != "1" or check_path(of(config, path))]
    for path in good:
        model = build(of(config, path))
        model.kept_iterations = kept
        if "+" in path:
            compare_prefix(of(config, "fused"), of(config, path), model)
        for rows in map(int, options["rows"].split(",")):
            try:
                measure(model, path, depth, rows, float(options["seconds"]))
                if path in options["profile"].split(","):
                    file = RESULTS / f"step-profile-{path.replace('+', '-')}-{rows}.csv"
                    profile_step(Step(model, rows, depth), file)
            except torch.cuda.OutOfMemoryError as error:
                print(f"{path}, {rows} rows: {str(error).splitlines()[0]}", flush=True)
            model.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()
        for pair in filter(None, options["depths"].split(",")):
            no_grad, with_grad = map(int, pair.split("/"))
            measure(model, path, Depth(no_grad, with_grad), 1, float(options["seconds"]) / 4)
        del model
        gc.collect()
        torch.cuda.empty_cache()


def of(config: ModelConfig, path: str) -> ModelConfig:
    """The model's configuration on a path as it is named here."""
    name, _, precision = path.partition("+")
    return dataclasses.replace(
        config,
        path=ComputePath(name),
        no_grad_precision=ProductPrecision.fp8 if precision else ProductPrecision.same,
        grad_precision=ProductPrecision("fp8" if precision == "fp8-all" else "same"),
    )


def build(config: ModelConfig) -> RecurrentModel:
    """The model in bf16 with its initial weights."""
    started = time.monotonic()
    with torch.device("cuda"):
        model = RecurrentModel(config)
    initialize(model, mean_depth=32, seed=int(time.time()))
    model.to(torch.bfloat16)
    torch.cuda.synchronize()
    print(f"{config.path.value}: built in {time.monotonic() - started:.1f} s", flush=True)
    return model


class Step:
    """One forward and backward pass of random rows."""

    def __init__(self, model: RecurrentModel, rows: int, depth: Depth) -> None:
        config = model.config
        self.model, self.depths = model, [depth] * rows
        tokens = torch.randint(config.vocabulary_size, (rows, config.context + 1), device="cuda")
        self.tokens, self.labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        shape = (rows, config.context, config.width)
        self.state = torch.randn(shape, device="cuda", dtype=torch.bfloat16) * config.state_sigma

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


def measure(model: RecurrentModel, path: str, depth: Depth, rows: int, seconds: float) -> None:
    """Run for so long, and append one row."""
    step, config = Step(model, rows, depth), model.config
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times, started = [], time.perf_counter()
    while time.perf_counter() - started < seconds:
        before = time.perf_counter()
        nats = step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - before)
    assert torch.isfinite(nats)
    sustained_s = sum(times)
    tokens = rows * config.context
    rate = tokens * len(times) / sustained_s
    flops = rate * TokenFlops.of(config).model(depth.no_grad, depth.with_grad)
    early = [t for t, at in zip(times, range(len(times)), strict=True) if sum(times[:at]) < 1]
    name, _, precision = path.partition("+")
    row = {
        "preset": config.name, "path": name, "precision": PRECISIONS[precision],
        "rows": rows, "gpus": 1, "zero": 0, "accumulation": 1,
        "tokens_per_s_per_gpu": round(rate, 1), "sustained_s": round(sustained_s, 1),
        "peak_bytes": torch.cuda.max_memory_allocated(), "gpu": card(),
        "torch": torch.__version__, "commit": os.environ.get("PRETRAIN_COMMIT", "unknown"),
        "no_grad": depth.no_grad, "with_grad": depth.with_grad,
        "kept_iterations": "" if model.kept_iterations is None else model.kept_iterations,
        "first_second_tokens_per_s": round(tokens / statistics.mean(early), 1),
        "model_tflops_per_s": round(flops / 1e12, 1),
    }  # fmt: skip
    append(RESULTS / "step.csv", row)
    print(
        f"{path:10} {rows} rows ({depth.no_grad}, {depth.with_grad}): {rate:8,.0f} tokens/s over "
        f"{sustained_s:.0f} s (first second {row['first_second_tokens_per_s']:,.0f}), "
        f"{flops / 1e12:.0f} TFLOP/s, MFU {flops / PEAK_FLOPS:.1%}, "
        f"{row['peak_bytes'] / 1e9:.1f} GB",
        flush=True,
    )


def card() -> str:
    """The name of the GPU, or cpu."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def append(path: Path, row: dict[str, Any]) -> None:
    """One row of a CSV file, in the order of its first line; a new file begins with the names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="") as file:
        file.seek(0)
        columns = next(csv.reader(file), None)
        file.seek(0, os.SEEK_END)
        writer = csv.DictWriter(file, columns or list(row))
        if columns is None:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
