"""How fast text is generated: ours beside transformers' `generate` of our export.

The same random weights, the same prompts, greedy, from zero states. A row is one cell: the time
from one token of the batch to the next, behind the prompt and the first two tokens (which pay for
the prompt and the capture of a graph). Without a GPU, tiny models: that only shows that it runs.

    python kernels/benchmarks/generation.py        # transformers is measured if it is installed
"""

import csv
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from measurements import RESULTS, commit, said
from pretrain.model.config import ModelConfig
from pretrain.model.decoding import Decoding, Exit, StateStart
from pretrain.model.depth import Depth
from pretrain.model.generation import Chosen, collect, generate_rows, read_prompts
from pretrain.model.huggingface.save import save_pretrained
from pretrain.model.init import initialize
from pretrain.model.reading import Decoder
from pretrain.model.recurrent import RecurrentModel
from pretrain.model.sampling import choose
from pretrain.model.speculative import speculate_rows

ROOT = Path(__file__).parents[2]
COLUMNS = (
    "op", "shape", "dtype", "median_us", "p20", "p80", "tokens_per_s", "prompt_us", "peak_bytes",
    "gpu", "driver", "torch", "triton", "transformers", "commit",
)  # fmt: skip
# Tokens of the batch that are not timed: behind the prompt, and the one that captures a graph.
SETTLING = 2


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    presets: tuple[str, ...]
    batches: tuple[int, ...]
    depths: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    seconds: float
    """No cell is measured longer, once it has 8 tokens."""
    changes: dict[str, int]
    """Of the presets."""


ON_GPU = Plan(
    presets=("huginn-100m", "huginn-3.5b"),
    batches=(1, 32),
    depths=(4, 8, 16, 32, 64),
    prompt_tokens=128,
    new_tokens=96,
    seconds=1.5,
    changes={},
)
ON_CPU = replace(
    ON_GPU,
    presets=("tiny",),
    batches=(1, 2),
    depths=(2, 4),
    prompt_tokens=8,
    new_tokens=12,
    changes={"width": 32, "heads": 2, "inner": 48, "vocabulary_size": 256},
)


@dataclass
class Cell:
    """One measurement: when each round of tokens came, and how many a row had got."""

    op: str
    times_s: list[float]
    tokens: list[int]
    peak_bytes: int


def make_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> RecurrentModel:
    """Random weights, as training begins with."""
    with torch.device("meta"):
        model = RecurrentModel(config).to(dtype)
    model = model.to_empty(device=device)
    initialize(model, mean_depth=32, seed=0)
    return model.eval()


def make_prompts(config: ModelConfig, rows: int, tokens: int) -> list[list[int]]:
    """Random ids."""
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(config.vocabulary_size, (rows, tokens), generator=generator).tolist()


def gate(device: torch.device) -> None:
    """In float32, cached tokens are those of reading the whole text again, in every way we time."""
    config = ModelConfig(
        name="gate", width=64, heads=2, inner=96, prelude_layers=1, core_layers=2, coda_layers=1,
        vocabulary_size=128, context=64,
    )  # fmt: skip
    model = make_model(config, device, torch.float32)
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            # As initialised, layers hardly change the state, and all tokens would be one.
            parameter.add_(torch.randn(parameter.shape, generator=generator, device=device) * 0.1)
    prompts = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3]]
    options = Decoding(num_steps=5, max_new_tokens=12, start=StateStart.zeros)
    rows = collect(generate_rows(model, prompts, options))
    rounds = speculate_rows(model, prompts, replace(options, draft_steps=2, lookahead=3))
    parts = list(zip(*(each.chosen for each in rounds), strict=True))
    assert [[c.token for part in row for c in part] for row in parts] == rows, "speculation differs"
    exits = replace(options, exit=Exit.latent_diff, exit_threshold=1e-9)
    assert collect(generate_rows(model, prompts, exits)) == rows, "adaptive decoding differs"
    for prompt, new in zip(prompts, rows, strict=True):
        text = torch.tensor([prompt + new], device=device)
        start = torch.zeros(1, text.shape[1], config.width, device=device)
        with torch.no_grad():
            logits = model(text, [Depth(5, 0)], initial_state=start).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == new, "cached decoding differs"


def start_clock(device: torch.device) -> float:
    """Now, with nothing left to do on the device; its peak of memory starts anew."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    return time.perf_counter()


def peak_bytes(device: torch.device) -> int:
    """Of device memory since the clock started; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def time_ours(
    op: str, model: RecurrentModel, prompts: list[list[int]], options: Decoding, plan: Plan
) -> Cell:
    """Our generator; `op` says which of its ways."""
    device = model.embedding.weight.device
    start = start_clock(device)
    times, tokens, steps = [], [], []
    for chosen in rounds_of(op, model, prompts, options):
        times.append(time.perf_counter() - start)
        tokens.append(sum(len(row) for row in chosen) // len(chosen))
        steps += [each.steps for row in chosen for each in row]
        if len(times) >= 8 + SETTLING and times[-1] > plan.seconds:
            break
    mean = sum(steps[len(prompts) :]) / max(len(steps) - len(prompts), 1)
    name = f"{op}, {mean:.1f} iterations a token" if options.exit is not Exit.none else op
    if options.draft_steps is not None:
        name = f"{op}, {sum(tokens[1:]) / max(len(tokens) - 1, 1):.1f} tokens a round"
    return Cell(name, times, tokens, peak_bytes(device))


def rounds_of(
    op: str, model: RecurrentModel, prompts: list[list[int]], options: Decoding
) -> Iterator[list[list[Chosen]]]:
    """New tokens of every row, as they come."""
    if options.draft_steps is not None:
        yield from (each.chosen for each in speculate_rows(model, prompts, options))
    elif op.endswith("without graphs"):
        capacity = len(prompts[0]) + options.max_new_tokens - 1
        decoder = Decoder(model, options, rows=len(prompts), capacity=capacity, is_graphed=False)
        logits_BV = read_prompts(decoder, prompts)
        for _ in range(options.max_new_tokens - 1):
            lengths = decoder.cache.lengths
            chosen_B = choose(logits_BV, options, rows=decoder.rows, positions=lengths)
            yield [[Chosen(token, options.num_steps)] for token in chosen_B.tolist()]
            logits_BV = decoder.read(chosen_B[:, None])
    else:
        for step in generate_rows(model, prompts, options):
            yield [[chosen] for chosen in step if chosen is not None]


def time_transformers(
    exported: Any, prompts: list[list[int]], options: Decoding, plan: Plan
) -> Cell:
    """`generate` of the export, eager, with its cache."""
    device = exported.device
    ids = torch.tensor(prompts, device=device)
    times: list[float] = []

    def clock(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        # What transformers' own stopping does too: the host waits for every token.
        int(input_ids[0, -1])
        times.append(time.perf_counter() - start)
        is_over = len(times) >= 8 + SETTLING and times[-1] > plan.seconds
        return torch.full((len(prompts),), is_over, device=device)

    start = start_clock(device)
    exported.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=options.max_new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        num_steps=options.num_steps,
        init_scale=0.0,
        stopping_criteria=[clock],
    )
    return Cell("transformers generate", times, [1] * len(times), peak_bytes(device))


def exported_cells(
    model: RecurrentModel, plan: Plan, folder: Path
) -> Iterator[tuple[str, Cell | None]]:
    """What transformers makes of our export; None if it is not installed."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        yield model.config.name, None
        return
    config, weight = model.config, model.embedding.weight
    save_pretrained(model, folder, dtype=weight.dtype)
    # Ours makes way, so that the peak of memory is that of one model.
    model.to("meta")
    exported = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=weight.dtype
    )
    exported = exported.to(weight.device).eval()
    del weight
    for shape, prompts, options in grid(config, plan):
        yield shape, time_transformers(exported, prompts, options, plan)


def grid(config: ModelConfig, plan: Plan) -> Iterator[tuple[str, list[list[int]], Decoding]]:
    """The shapes that both sides are measured at."""
    for rows in plan.batches:
        prompts = make_prompts(config, rows, plan.prompt_tokens)
        for depth in plan.depths:
            shape = f"{config.name} B={rows} r={depth} prompt={plan.prompt_tokens}"
            yield (
                shape,
                prompts,
                Decoding(num_steps=depth, max_new_tokens=plan.new_tokens, start=StateStart.zeros),
            )


def our_cells(model: RecurrentModel, plan: Plan) -> Iterator[tuple[str, Cell | None]]:
    """Every depth, and the ways to spend less than the last but one."""
    for shape, prompts, options in grid(model.config, plan):
        yield shape, time_ours("pretrain", model, prompts, options, plan)
        if options.num_steps != plan.depths[-2]:
            continue
        yield shape, time_ours("pretrain without graphs", model, prompts, options, plan)
        adaptive = replace(options, exit=Exit.latent_diff)
        yield shape, time_ours("pretrain adaptive latent_diff", model, prompts, adaptive, plan)
        draft = replace(options, draft_steps=max(options.num_steps // 8, 1), lookahead=4)
        op = f"pretrain draft {draft.draft_steps}"
        yield shape, time_ours(op, model, prompts, draft, plan)


def environment(device: torch.device) -> dict[str, str]:
    """What a measurement depends on besides the code."""

    def version(name: str) -> str:
        try:
            return str(__import__(name).__version__)
        except ImportError:
            return "absent"

    is_gpu = device.type == "cuda"
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": torch.cuda.get_device_name() if is_gpu else f"none, {platform.machine()}",
        "driver": said(*query) if is_gpu else "none",
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "commit": commit(),
    }


def as_row(shape: str, dtype: torch.dtype, cell: Cell | None) -> dict[str, str]:
    """One row of the results."""
    if cell is None:
        return {"op": "transformers generate, skipped: not installed", "shape": shape}
    batch = int(shape.split("B=")[1].split()[0])
    gaps_us = np.diff(cell.times_s)[SETTLING - 1 :] * 1e6
    # Several tokens may come at once.
    per_token = gaps_us / np.array(cell.tokens[SETTLING:]).clip(min=1)
    low, median, high = np.quantile(per_token, [0.2, 0.5, 0.8])
    new_tokens = sum(cell.tokens[SETTLING:])
    return {
        "op": cell.op,
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "median_us": f"{median:.0f}",
        "p20": f"{low:.0f}",
        "p80": f"{high:.0f}",
        "tokens_per_s": f"{batch * new_tokens / gaps_us.sum() * 1e6:.1f}",
        "prompt_us": f"{cell.times_s[0] * 1e6:.0f}",
        "peak_bytes": str(cell.peak_bytes),
    }


def main(plan: Plan | None = None, results: Path = RESULTS / "generation.csv") -> None:
    """Check, measure, print and keep."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = plan or (ON_GPU if device.type == "cuda" else ON_CPU)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    gate(device)
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        if file.tell() == 0:
            writer.writeheader()
        for preset in plan.presets:
            values = yaml.safe_load((ROOT / f"conf/model/{preset}.yaml").read_text())
            model = make_model(ModelConfig(**(values | plan.changes)), device, dtype)
            with tempfile.TemporaryDirectory(prefix="export-") as folder:
                both = (our_cells(model, plan), exported_cells(model, plan, Path(folder, "model")))
                for shape, cell in chain(*both):
                    row = as_row(shape, dtype, cell) | environment(device)
                    writer.writerow(row)
                    file.flush()
                    print(", ".join(list(row.values())[:9]), flush=True)


if __name__ == "__main__":
    main()
