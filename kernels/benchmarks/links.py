"""How fast the GPUs of one host exchange data: the collectives that ZeRO uses, by size.

    torchrun --standalone --nproc-per-node=2 kernels/benchmarks/links.py

One row per collective and size goes to results/links.csv. Bus bandwidth is what each GPU's links
carry: bytes of the whole tensor x (n - 1) / n per pass over the ring, two passes for all_reduce,
over the median time.
"""

import os
import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from measurements import RESULTS, append, commit

COLUMNS = ("collective", "bytes", "median_us", "bus_gb_per_s", "gpus", "gpu", "torch", "commit")
SIZES = [1 << power for power in (16, 20, 24, 28, 30)]
REPEATS = 20


def collectives(whole: Tensor, gpus: int) -> dict[str, tuple[Callable[[], object], int]]:
    """What to call, and how often the tensor passes the ring, by name."""
    own = whole.view(gpus, -1)[dist.get_rank()].clone()
    return {
        "all_reduce": (lambda: dist.all_reduce(whole), 2),
        "reduce_scatter": (lambda: dist.reduce_scatter_tensor(own, whole), 1),
        "all_gather": (lambda: dist.all_gather_into_tensor(whole, own), 1),
    }


def median_us(call: Callable[[], object]) -> float:
    """Of single calls, timed by events on the slowest rank."""
    times = []
    for repeat in range(REPEATS + 3):
        dist.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if repeat >= 3:
            times.append(start.elapsed_time(end) * 1e3)
    slowest = torch.tensor(statistics.median(times), device="cuda")
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item()


def check(gpus: int) -> None:
    """The links add up right before they are timed."""
    value = torch.arange(1000, device="cuda", dtype=torch.float32) + dist.get_rank()
    dist.all_reduce(value)
    wanted = torch.arange(1000, device="cuda") * gpus + sum(range(gpus))
    assert torch.equal(value, wanted.float()), "all_reduce gives wrong sums"


def main() -> None:
    """Measure every collective at every size; rank 0 writes."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    gpus = dist.get_world_size()
    check(gpus)
    rows = []
    for size in SIZES:
        whole = torch.randn(size // 2, device="cuda", dtype=torch.float32).to(torch.bfloat16)
        for name, (call, passes) in collectives(whole, gpus).items():
            passed_us = median_us(call)
            rate = passes * size * (gpus - 1) / gpus / passed_us / 1e3
            identity = (torch.cuda.get_device_name(), torch.__version__, commit())
            rows.append((name, size, round(passed_us, 1), round(rate, 2), gpus, *identity))
    if dist.get_rank() == 0:
        for row in rows:
            append(RESULTS / "links.csv", dict(zip(COLUMNS, row, strict=True)))
            print(*row[:4])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
