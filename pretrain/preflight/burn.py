"""How fast the processors of a node multiply and copy, and whether they multiply right."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

# 1.1 TFLOP a product: 2 ms on an H100, so that launching costs nothing.
GPU_SIDE = 8192
# 0.13 GFLOP: 1 ms on two cores, small enough for a short burn on a loaded machine.
CPU_SIDE = 512
# Products between two looks at the clock.
BATCH = 16
# A GPU's clock falls for about a second until power and temperature have settled.
WARM_SHARE = 1 / 3
COPY_BYTES = {"cuda": 256 << 20, "cpu": 64 << 20}
COPIES = 5


@dataclass(frozen=True, slots=True)
class Burnt:
    """What one device did."""

    tflops: float
    """10^12 floating-point operations per second, sustained: bf16 on a GPU, fp32 on a CPU."""
    is_exact: bool
    """Whether the same numbers gave the same product, bit for bit, first and last."""


def burn(
    devices: list[torch.device], seconds: float, midway: Callable[[], None] | None = None
) -> list[Burnt]:
    """Multiply square matrices on all devices at once; only the last two thirds are timed.

    All at once, as in training: boards share power and cooling. `midway` is called in a thread
    when half of the time is over and the devices are busy; what it raises is raised here.
    """
    works = [_Work(device) for device in devices]
    begin = time.perf_counter()
    watching: Future[None] | None = None
    is_timing = False
    # beside: while the driver is asked for its state, the devices must not run out of work
    with ThreadPoolExecutor(max_workers=1) as beside:
        while (spent := time.perf_counter() - begin) < seconds:
            if not is_timing and spent >= WARM_SHARE * seconds:
                _start_clocks(works)
                is_timing = True
            if midway is not None and watching is None and spent >= seconds / 2:
                watching = beside.submit(midway)
            for work in works:
                work.multiply()
        if midway is not None and watching is None:
            watching = beside.submit(midway)
        if not is_timing:
            # one batch took longer than there was time before the clock starts
            _start_clocks(works)
            for work in works:
                work.multiply()
        results = [work.result() for work in works]
        if watching is not None:
            watching.result()
    return results


def _start_clocks(works: "list[_Work]") -> None:
    for work in works:
        work.start_clock()


class _Work:
    """Matrix products on one device, enqueued a batch ahead."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_gpu = device.type == "cuda"
        self._side = GPU_SIDE if self._is_gpu else CPU_SIDE
        generator = torch.Generator(device).manual_seed(0)
        dtype = torch.bfloat16 if self._is_gpu else torch.float32
        self._a, self._b = (
            torch.randn(self._side, self._side, generator=generator, device=device, dtype=dtype)
            for _ in range(2)
        )
        self._first = self._a @ self._b
        self._product = torch.empty_like(self._first)
        self._queued: deque[torch.cuda.Event] = deque()
        self._products = 0
        self._begin: torch.cuda.Event | float = 0.0

    def start_clock(self) -> None:
        self._begin = self._now()
        self._products = 0

    def multiply(self) -> None:
        """A batch; waits for the one before last, so that the device never idles."""
        for _ in range(BATCH):
            torch.mm(self._a, self._b, out=self._product)
        self._products += BATCH
        if self._is_gpu:
            mark = self._now()
            assert isinstance(mark, torch.cuda.Event)
            self._queued.append(mark)
            if len(self._queued) > 2:
                self._queued.popleft().synchronize()

    def result(self) -> Burnt:
        end = self._now()
        if isinstance(end, float):
            assert isinstance(self._begin, float)
            seconds = end - self._begin
        else:
            assert isinstance(self._begin, torch.cuda.Event)
            end.synchronize()
            seconds = self._begin.elapsed_time(end) / 1000
        flop = 2.0 * self._side**3 * self._products
        return Burnt(flop / seconds / 1e12, _is_same(self._first, self._product))

    def _now(self) -> "torch.cuda.Event | float":
        if not self._is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _is_same(first: Tensor, last: Tensor) -> bool:
    return bool(torch.isfinite(last).all()) and torch.equal(first, last)


def copy_rates(devices: list[torch.device]) -> dict[str, list[float]]:
    """10^9 bytes per second: from pinned host memory to each GPU, and to the next GPU of the node.

    On a CPU: within its memory. The best of a few, since a copy is short.
    """
    if devices[0].type == "cpu":
        source = torch.ones(COPY_BYTES["cpu"], dtype=torch.uint8)
        return {"host_copy_gb_per_s": [_copy_rate(source, torch.empty_like(source))]}
    host = torch.ones(COPY_BYTES["cuda"], dtype=torch.uint8).pin_memory()
    buffers = [torch.empty(COPY_BYTES["cuda"], dtype=torch.uint8, device=d) for d in devices]
    rates = {"host_copy_gb_per_s": [_copy_rate(host, buffer) for buffer in buffers]}
    if len(buffers) > 1:
        rates["peer_copy_gb_per_s"] = [
            _copy_rate(buffer, buffers[(index + 1) % len(buffers)])
            for index, buffer in enumerate(buffers)
        ]
    return rates


def _copy_rate(source: Tensor, target: Tensor) -> float:
    best = float("inf")
    # the first copy touches the memory and opens the way between peers
    for _ in range(COPIES + 1):
        _settle(source, target)
        begin = time.perf_counter()
        target.copy_(source, non_blocking=True)
        _settle(source, target)
        best = min(best, time.perf_counter() - begin)
    return source.numel() / best / 1e9


def _settle(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.device.type == "cuda":
            torch.cuda.synchronize(tensor.device)
