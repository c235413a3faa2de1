"""Which block sizes, warps and stages are fastest: every op at the 3.5B shapes, on one GPU.

Nothing is chosen while a model runs, where that would cost compilation and noise. What this
program finds fastest is written into the constants on top of the op's Triton module, by hand, with
the row that says so. A candidate that is wrong gets no time; the one in use is marked.

    python kernels/benchmarks/tune.py --only norm_chain
"""

import argparse
import contextlib
import csv
import importlib
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from measurements import RESULTS
from micro import NO_GPU, all_cases, environment
from micro_ops import products
from micro_ops.case import Case, Inputs, Outputs, Prepare, Run
from micro_ops.check import find_faults
from micro_ops.clock import measure
from pretrain_kernels.spans import SPAN_ELEMENTS

COLUMNS = (
    "op", "shape", "constants", "in_use", "median_us", "p20", "p80", "limit_share", "gpu",
    "driver", "torch", "triton", "commit",
)  # fmt: skip
# Most time on the replays of one op; compiling comes on top, some seconds a candidate.
SECONDS_AN_OP = 10.0
Constants = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sweep:
    """One op of micro_ops, and constants of its module to try."""

    op: str
    module: str
    axes: Mapping[str, Sequence[Any]]

    def candidates(self) -> list[Constants]:
        """All combinations, the one in use first."""
        used = self.in_use()
        tried = [
            dict(zip(self.axes, values, strict=True))
            for values in itertools.product(*self.axes.values())
        ]
        return [used, *(constants for constants in tried if constants != used)]

    def in_use(self) -> Constants:
        """What the module has now."""
        module = importlib.import_module(self.module)
        return {name: getattr(module, name) for name in self.axes}


def _sweep(op: str, folder: str, **axes: Sequence[Any]) -> Sweep:
    return Sweep(op, f"pretrain_kernels.{folder}.triton", axes)


_BLOCKS = {"BLOCK": (512, 1024, 2048, 4096), "NUM_WARPS": (2, 4, 8)}
_BACKWARD = {"BACKWARD_ELEMENTS": (16, 32), "BACKWARD_STAGES": (1, 2, 3, 4)}
SWEEPS = (
    _sweep("norm_chain", "norm_chain", FORWARD_ELEMENTS=(8, 16, 32, 64)),
    _sweep("norm_chain fp8", "norm_chain", FORWARD_ELEMENTS=(8, 16, 32, 64)),
    _sweep("norm_chain backward", "norm_chain", **_BACKWARD),
    _sweep(
        "rms_norm backward", "norm_chain", **_BACKWARD,
        BACKWARD_PROGRAMS=({1: 1, 2: 1}, {1: 2, 2: 1}),
    ),
    _sweep("qk_rope", "qk_rope", PAIRS=(256, 512, 1024), NUM_WARPS=(2, 4, 8)),
    _sweep(
        "qk_rope backward", "qk_rope", BACKWARD_PAIRS=(256, 512), BACKWARD_WARPS=(1, 2, 4),
        BACKWARD_STAGES=(1, 3), WALKERS=(64, 96),
    ),
    _sweep("swiglu", "swiglu", **_BLOCKS),
    _sweep("swiglu backward", "swiglu", **_BLOCKS),
    _sweep("swiglu fp8", "swiglu", FP8_ELEMENTS=(32, 128)),
    _sweep("quantize_rows", "quantize_rows", ELEMENTS=(8, 16, 32, 64)),
    _sweep(
        "quantize_both_ways", "quantize_both_ways", ROWS=(64, 128), COLUMNS=(64, 128),
        NUM_WARPS=(2, 4, 8),
    ),
    _sweep("cross_entropy nats", "linear_cross_entropy", **_BLOCKS),
    _sweep("cross_entropy gradient", "linear_cross_entropy", **_BLOCKS),
    _sweep("ellis_adam", "ellis_adam", BLOCK=(512, 1024, 2048), NUM_WARPS=(2, 4, 8)),
    _sweep("adamw with norms", "adamw", BLOCK=(512, 1024, 2048), NUM_WARPS=(2, 4, 8)),
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and keep. 0, or NO_GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="ops whose name contains this")
    parser.add_argument(
        "--results", type=Path, default=RESULTS / "tune.csv", help="CSV to append to"
    )
    options = parser.parse_args(arguments)
    if not any(options.only in sweep.op for sweep in SWEEPS):
        names = ", ".join(sweep.op for sweep in SWEEPS)
        parser.error(f"--only {options.only} is in no name of {names}")
    if not torch.cuda.is_available():
        sys.stderr.write("tune.py measures kernels and needs a CUDA GPU; torch sees none.\n")
        return NO_GPU
    device = torch.device("cuda")
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with options.results.open("a", newline="") as file, torch.cuda.stream(torch.cuda.Stream()):
        writer = csv.DictWriter(file, COLUMNS)
        if file.tell() == 0:
            writer.writeheader()
        about, limit = environment(), copy_rate(device)
        for sweep in SWEEPS:
            if options.only in sweep.op:
                for row in rows_of(sweep, limit, device):
                    writer.writerow(row | about)
                    file.flush()
    return 0


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a large copy: the limit of all that is tuned here."""
    case = next(products.limits())
    times, _ = measure(case, list(case.providers), device, 1.0)
    return case.amount / (float(np.median(times["torch"])) * 1e-6)


def rows_of(sweep: Sweep, limit: float, device: torch.device) -> Iterator[dict[str, str]]:
    """Of one op, fastest first; printed too."""
    case = with_candidates(sweep)
    faults = find_faults(case, device)
    for name, fault in faults.items():
        print(f"{sweep.op}, {name}: not measured: {fault}", flush=True)
    names = [name for name in case.providers if name not in {"eager", *faults}]
    times, _ = measure(case, names, device, SECONDS_AN_OP)
    in_use = _said(sweep.in_use())
    for name in sorted(names, key=lambda name: float(np.median(times[name]))):
        p20, median, p80 = np.quantile(times[name], [0.2, 0.5, 0.8])
        row = {
            "op": sweep.op, "shape": case.shape, "constants": name,
            "in_use": "yes" if name == in_use else "", "median_us": f"{median:.2f}",
            "p20": f"{p20:.2f}", "p80": f"{p80:.2f}",
            "limit_share": f"{case.amount / (median * 1e-6) / limit:.3f}",
        }  # fmt: skip
        print(", ".join(value for value in row.values() if value), flush=True)
        yield row


def with_candidates(sweep: Sweep) -> Case:
    """The op's case with a provider for each candidate, and eager to check them by."""
    [case] = [case for case in all_cases() if case.op == sweep.op]
    ours = case.providers["ours"]
    candidates = {
        _said(constants): under(sweep.module, constants, ours) for constants in sweep.candidates()
    }
    return replace(case, providers={"eager": case.providers["eager"]} | candidates)


def under(module: str, constants: Constants, prepare: Prepare) -> Prepare:
    """The provider with these constants in its module, put back after each call."""

    def prepared(inputs: Inputs) -> Run:
        with replaced(module, constants):
            run = prepare(inputs)

        def with_constants() -> Outputs:
            with replaced(module, constants):
                return run()

        return with_constants

    return prepared


@contextlib.contextmanager
def replaced(name: str, constants: Constants) -> Iterator[None]:
    """The module with these constants."""
    module = importlib.import_module(name)
    if "BLOCK" in constants and hasattr(module, "BLOCKS"):
        # of a span, which the optimizers' programs walk over
        constants = {**constants, "BLOCKS": SPAN_ELEMENTS // constants["BLOCK"]}
    before = {name: getattr(module, name) for name in constants}
    try:
        vars(module).update(constants)
        yield
    finally:
        vars(module).update(before)


def _said(constants: Constants) -> str:
    return " ".join(f"{name}={value}" for name, value in constants.items())


if __name__ == "__main__":
    sys.exit(main())
