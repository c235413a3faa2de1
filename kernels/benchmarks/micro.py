"""How fast each op is: ours beside eager, torch.compile and Liger (where installed), on one GPU.

Every provider is first compared with float64 on fresh random inputs, and gets no time while it is
wrong. Times are medians of CUDA-graph replays, providers in turns, on inputs out of the cache. The
share is of what a copy, or a product of 8192 x 8192 x 8192, reaches in the same run.

    make bench                                    # or, with a part of the ops and less time:
    python kernels/benchmarks/micro.py --only norm_chain --seconds 60
"""

import argparse
import csv
import importlib.util
import logging
import platform
import secrets
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch._functorch.config

from measurements import RESULTS, check_writable, commit, said
from micro_ops import attention, core, products, updates
from micro_ops.case import HUGINN, Case
from micro_ops.check import find_faults
from micro_ops.clock import measure

COLUMNS = (
    "op", "shape", "dtype", "provider", "median_us", "p20", "p80", "peak_bytes",
    "gb_per_s_or_tflops", "limit_share", "gpu", "driver", "torch", "triton", "commit",
)  # fmt: skip
# Most time on the replays of one case; compiling and checking come on top.
SECONDS_A_CASE = 2.0
NO_GPU = 3


def main(arguments: list[str] | None = None) -> int:
    """Check, measure, print and keep. 0, NO_GPU, or 1 if a provider of ours is wrong."""
    options = parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if not torch.cuda.is_available():
        sys.stderr.write(
            "micro.py measures kernels and needs a CUDA GPU; torch "
            f"{torch.__version__} sees none on this machine ({platform.machine()}).\n"
        )
        return NO_GPU
    # a second pass through one graph is what the backward cases time
    torch._functorch.config.donated_buffer = False
    device = torch.device("cuda")
    seed = options.seed if options.seed is not None else secrets.randbits(32)
    torch.manual_seed(seed)
    print(f"seed {seed}", flush=True)
    if importlib.util.find_spec("liger_kernel") is None:
        print("liger-kernel is not installed: there will be no rows of it", flush=True)
    check_writable(options.results)
    with options.results.open("a", newline="") as file, torch.cuda.stream(torch.cuda.Stream()):
        writer = csv.DictWriter(file, COLUMNS)
        if file.tell() == 0:
            writer.writeheader()
        is_right = True
        for row in rows(options.only, options.seconds, device):
            if "fault" in row:
                is_right = is_right and row["provider"] != "ours"
                print(f"{row['op']}, {row['shape']}, {row['provider']}: {row['fault']}", flush=True)
                continue
            writer.writerow(row)
            file.flush()
            print(", ".join(list(row.values())[:10]), flush=True)
    return 0 if is_right else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="ops whose name contains this")
    parser.add_argument("--seconds", type=float, default=420, help="for the whole run")
    parser.add_argument("--seed", type=int, help="of the random inputs; default: a fresh one")
    parser.add_argument(
        "--results", type=Path, default=RESULTS / "micro.csv", help="CSV to append to"
    )
    options = parser.parse_args(arguments)
    ops = dict.fromkeys(case.op for case in all_cases())
    if not any(options.only in op for op in ops):
        parser.error(f"--only {options.only} is in no name of {', '.join(ops)}")
    return options


def all_cases() -> Iterator[Case]:
    """Those that decide most come first, because time may run out."""
    parts = (core, attention, updates, products)
    return chain.from_iterable(part.cases(HUGINN) for part in parts)


def rows(only: str, seconds: float, device: torch.device) -> Iterator[dict[str, str]]:
    """A row for each provider of each case, or what keeps it from being measured."""
    deadline = time.monotonic() + seconds
    about = environment()
    best: dict[str, float] = {}
    wanted = [case for case in all_cases() if only in case.op]
    for number, case in enumerate(chain(products.limits(), wanted)):
        left = deadline - time.monotonic()
        if left < 0 and case.limit:
            reason = f"not measured: the {seconds:.0f} s are over"
            yield {"op": case.op, "shape": case.shape, "provider": "all", "fault": reason}
            continue
        seconds_a_case = min(SECONDS_A_CASE, max(left, 0) / (len(wanted) + 4 - number))
        try:
            for row in rows_of(case, best, device, seconds_a_case):
                yield row if "fault" in row else row | about
        except RuntimeError as error:
            # of a card that is too small nothing of ours is wrong
            at_fault = "all" if isinstance(error, torch.OutOfMemoryError) else "ours"
            reason = f"not measured: {str(error).splitlines()[0]}"
            yield {"op": case.op, "shape": case.shape, "provider": at_fault, "fault": reason}
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def rows_of(
    case: Case, best: dict[str, float], device: torch.device, seconds: float
) -> Iterator[dict[str, str]]:
    """Of one case. A yardstick, whose limit is empty, is noted in `best` by the name of its op."""
    about = {"op": case.op, "shape": case.shape}
    faults = find_faults(case, device)
    for provider, fault in faults.items():
        yield about | {"provider": provider, "fault": f"not measured: {fault}"}
    providers = [name for name in case.providers if name not in faults]
    if "ours" in faults or not providers:
        return
    times, peaks = measure(case, providers, device, seconds)
    for provider in providers:
        p20, median, p80 = np.quantile(times[provider], [0.2, 0.5, 0.8])
        rate = case.amount / (median * 1e-6)
        if not case.limit:
            best[case.op] = max(rate, best.get(case.op, 0.0))
        limit = case.limit or case.op
        yield about | {
            "dtype": str(case.dtype).removeprefix("torch."),
            "provider": provider,
            "median_us": f"{median:.2f}",
            "p20": f"{p20:.2f}",
            "p80": f"{p80:.2f}",
            "peak_bytes": str(peaks[provider]),
            "gb_per_s_or_tflops": f"{rate / (1e9 if limit == 'copy' else 1e12):.1f}",
            "limit_share": f"{rate / best[limit]:.3f}" if limit in best else "",
        }


def environment() -> dict[str, str]:
    """What a measurement depends on besides the code."""

    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "absent"
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": version,
        "commit": commit(),
    }


if __name__ == "__main__":
    sys.exit(main())
