"""The command `pretrain evaluate`: held-out loss of a run at several depths, in one pass."""

import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pretrain.compose import thaw
from pretrain.config import EvaluateConfig
from pretrain.data.loader import open_manifest, valid_rows
from pretrain.engine.config import Device
from pretrain.engine.world import join, leave
from pretrain.loop.plots import plot_depth_curve
from pretrain.loop.state import check_same_data
from pretrain.loop.trained import load_trained
from pretrain.loop.validation import validate

log = logging.getLogger(__name__)


def main(config: EvaluateConfig) -> None:
    """Print the table, and write it and its plot into <run.dir>/evaluation.

    Under torchrun or srun the rows are shared among the ranks; the result is the same.
    """
    run_dir = Path(config.run.dir)
    # where the run was trained says nothing about where it is evaluated
    world = join(dataclasses.replace(thaw(run_dir).engine, device=Device.auto))
    trained = load_trained(run_dir, world.device)
    data = trained.config.data
    check_same_data(trained.state, open_manifest(data).fingerprint, data.shards)
    held_out = valid_rows(data, rows=config.evaluate.rows, rank=world.rank, ranks=world.size)
    result = validate(trained.model, trained.config, world, held_out, depths=config.evaluate.depths)
    if world.is_main:
        _report(run_dir, trained.step, result)
    leave(world)


def _report(run_dir: Path, step: int, result: dict[str, Any]) -> None:
    title = f"{run_dir.name} at step {step}: {result['validation/tokens']:,} held-out tokens"
    table = Table("depth", "loss (nats/token)", "perplexity", title=title)
    depths, losses = result["validation/depths"], result["validation/loss_nats"]
    for depth, loss in zip(depths, losses, strict=True):
        table.add_row(str(depth), f"{loss:.4f}", f"{math.exp(loss):.2f}")
    Console().print(table)
    folder = run_dir / "evaluation"
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:010d}.json"
    path.write_text(json.dumps({"step": step, **result}, indent=1) + "\n", encoding="utf-8")
    plot = plot_depth_curve(path.with_suffix(".png"), depths, losses, title=title)
    print(f"written: {path}\nplot:    {plot}")
