"""Times by CUDA-graph replays, providers in turns, on inputs that are not in the cache."""

import logging
import time
from collections.abc import Callable

import torch

from micro_ops.case import Case, Inputs, Run, clone

logger = logging.getLogger(__name__)
# Inputs of a round take at least this many times the second-level cache.
CACHES = 3
MAX_SETS = 32
MAX_ROUNDS = 41
MIN_ROUNDS = 5
WARM_UPS = 2


def input_sets(case: Case, device: torch.device) -> list[Inputs]:
    """Enough sets of the same inputs that no call finds its own in the cache."""
    first = case.make(case.size, device)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in first.values())
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    wanted = -(-CACHES * cache_bytes // num_bytes)
    return [first] + [clone(first) for _ in range(min(wanted, MAX_SETS) - 1)]


def peak_bytes(run: Run) -> int:
    """Most memory during one call beyond what was there before."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = run()
    torch.cuda.synchronize()
    del outputs
    return torch.cuda.max_memory_allocated() - before


def repeater(name: str, runs: list[Run]) -> Callable[[], object]:
    """All runs one after the other: a graph if they can be captured, else call by call."""
    for _ in range(WARM_UPS):
        for run in runs:
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            # Kept to the end, so that every call writes to memory of its own.
            kept = [run() for run in runs]
    except RuntimeError as error:
        logger.warning(
            "%s: no CUDA graph (%s); timed call by call", name, str(error).split("\n")[0]
        )
        torch.cuda.synchronize()
        end_capture_of_random_numbers()
        return lambda: [run() for run in runs]

    def replay() -> object:
        graph.replay()
        # what the graph reads and writes must stay allocated as long as it may be replayed
        return runs, kept

    return replay


def end_capture_of_random_numbers() -> None:
    """After a capture that failed.

    The state of the generator belongs to that graph for good and refuses calls outside of it; a
    new state, of another seed, does not.
    """
    fresh = torch.Generator("cuda")
    fresh.manual_seed(torch.cuda.initial_seed() + 1)
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(fresh.graphsafe_get_state())


def measure(
    case: Case, providers: list[str], device: torch.device, seconds: float
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Microseconds of a call in each round, and peak bytes, of each provider."""
    sets = input_sets(case, device)
    repeaters, peaks = {}, {}
    for provider in providers:
        runs = [case.providers[provider](inputs) for inputs in sets]
        peaks[provider] = peak_bytes(runs[0])
        repeaters[provider] = repeater(f"{case.op}, {provider}", runs)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]]
    events = {provider: [] for provider in providers}
    deadline = time.monotonic() + seconds
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.monotonic() > deadline:
            break
        for provider in providers:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            repeaters[provider]()
            end.record()
            events[provider].append((start, end))
        torch.cuda.synchronize()
    times = {
        provider: [start.elapsed_time(end) * 1e3 / len(sets) for start, end in pairs]
        for provider, pairs in events.items()
    }
    return times, peaks
