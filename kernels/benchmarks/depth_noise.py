"""What the draw of depths adds to the noise of the gradient, and to the time of a step.

    python kernels/benchmarks/depth_noise.py run.dir=out/learning/recurrent draws=16

The weights of a trained run stay as they are. Under each law a step's rows get depths `draws`
times, and each time their gradient g is computed; the noise is E|g - mean g|^2. With the same rows
each time (the next in the run's stream) it is what depths add; with other rows each time it is all
the noise that a step of the run has. Rows go to learning-noise.csv below `results`, in place of
those of the same run.
"""

import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learning_results import merge
from measurements import RESULTS, card, commit
from pretrain.config import TrainConfig
from pretrain.data.loader import Batch, stream_batches
from pretrain.loop.micro_batches import labels_of, micro_batches
from pretrain.loop.step_metrics import work
from pretrain.loop.trained import Trained, load_trained
from pretrain.model.config import DepthConfig, Sampling, Scope
from pretrain.model.depth import step_depths
from pretrain.model.loss import IGNORED

# depths of drawings that no run has made
SEED = 7_000_000


def laws(own: DepthConfig) -> dict[str, DepthConfig]:
    """How depths may be drawn, by name; the run's own law of one row in all of them."""
    rows = replace(own, scope=Scope.row, block_rows=1, lanes=None, sampling=Sampling.stratified)
    return {
        "rows, dealt": rows,
        "rows, independent": replace(rows, sampling=Sampling.independent),
        "one depth a step": replace(rows, scope=Scope.step),
    }


def main() -> None:
    """Measure every law, and keep what was found."""
    words = dict(word.partition("=")[::2] for word in sys.argv[1:])
    if words.keys() - {"run.dir", "draws", "results"} or "run.dir" not in words:
        raise SystemExit("Give run.dir=FOLDER of a trained run; draws=NUMBER and results=FOLDER.")
    run_dir, draws = Path(words["run.dir"]), int(words.get("draws", "16"))
    if draws < 2:
        raise SystemExit(f"draws={draws}: a variance needs at least 2.")
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = load_trained(run_dir, place)
    trained.model.train()
    rows = []
    taken = list(islice(stream(trained), draws))
    for name, depth in laws(trained.config.depth).items():
        for kind, batches in (("same", taken[:1] * draws), ("other", taken)):
            about = {"run": run_dir.name, "depths": name, "rows": kind}
            rows.append({**about, **measure(trained, depth, batches)})
            print(*(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    results = Path(words.get("results", RESULTS))
    results.mkdir(parents=True, exist_ok=True)
    merge(results / "learning-noise.csv", rows)


def stream(trained: Trained) -> Iterator[Batch]:
    """Steps of rows from where the run ended."""
    config = trained.config
    return stream_batches(
        replace(config.data, loader_workers=0),
        seed=config.run.seed,
        first_row=int(trained.state["train"]["rows"]),
        rows_per_step=config.rows_per_step,
        rank=0,
        ranks=1,
    )


def measure(trained: Trained, depth: DepthConfig, batches: list[Batch]) -> dict[str, Any]:
    """The spread of gradients and of times over drawings of depths."""
    rows = trained.config.rows_per_step
    gradients, seconds, works = [], [], []
    for number, batch in enumerate(batches):
        depths = step_depths(depth, seed=SEED, first_row=number * rows, rows=rows)
        if not number:
            # the first pass of a shape compiles and allocates
            gradient(trained, batch, depths)
        started = time.perf_counter()
        gradients.append(gradient(trained, batch, depths))
        seconds.append(time.perf_counter() - started)
        works.append(work(depths) / rows)
    return {
        **spread(gradients),
        "pass_s": round(statistics.mean(seconds), 5),
        "pass_s_deviation": round(statistics.stdev(seconds), 5),
        "work_per_row": round(statistics.mean(works), 3),
        "work_deviation": round(statistics.stdev(works), 4),
        "draws": len(batches), "step_rows": rows, "step": trained.step, "device": card(),
        "commit": commit(),
    }  # fmt: skip


def gradient(trained: Trained, batch: Batch, depths: list[Any]) -> Tensor:
    """Of the mean nats of a step's rows, all parameters end to end, float32."""
    config: TrainConfig = trained.config
    model = trained.model
    model.zero_grad(set_to_none=True)
    labels = int((labels_of(batch, config.model.documents) != IGNORED).sum())
    for micro in micro_batches(
        batch, depths, model=config.model, micro_rows=config.batch.micro_rows,
        seed=config.run.seed, device=next(model.parameters()).device,
    ):  # fmt: skip
        output = model(
            micro.tokens_BT, micro.depths, initial_state=micro.initial_state_BTD,
            labels=micro.labels_BT, documents=micro.documents_BT, keep_logits=False,
        )  # fmt: skip
        (output.nats / labels).backward()
    # one number out of it: until it is there, the pass has not ended
    found = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
    assert bool(torch.isfinite(found.sum()))
    return found


def spread(gradients: list[Tensor]) -> dict[str, Any]:
    """The noise with its standard error, the square of the mean gradient, and their ratio."""
    count = len(gradients)
    mean = torch.zeros_like(gradients[0])
    for one in gradients:
        mean += one / count
    squares = [float((one - mean).square().sum()) * count / (count - 1) for one in gradients]
    noise = statistics.mean(squares)
    # the square of a mean of `count` draws has noise / count too much
    signal = float(mean.square().sum()) - noise / count
    norms = [float(one.norm()) for one in gradients]
    return {
        "noise": f"{noise:.5g}",
        "standard_error": f"{statistics.stdev(squares) / count**0.5:.3g}",
        "gradient_square": f"{signal:.5g}",
        "noise_to_square": f"{noise / signal:.4g}" if signal > 0 else "",
        "norm_deviation": f"{statistics.stdev(norms) / statistics.mean(norms):.4g}",
    }


if __name__ == "__main__":
    main()
