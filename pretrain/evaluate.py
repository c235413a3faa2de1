"""The command `pretrain evaluate`: a run at several depths, by its held-out loss or on tasks."""

import dataclasses
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pretrain.compose import thaw
from pretrain.config import EvaluateConfig
from pretrain.data.loader import open_manifest, valid_rows
from pretrain.data.tokenizer import Tokenizer
from pretrain.engine.config import Device
from pretrain.engine.world import World, join, leave
from pretrain.loop.plots import plot_depth_curve
from pretrain.loop.run_folder import on_rank_0, try_folder
from pretrain.loop.state import check_same_data, check_same_tokenizer
from pretrain.loop.trained import Trained, check_is_here, load_trained
from pretrain.loop.validation import validate
from pretrain.model.fixed import fixed_weights
from pretrain.tasks.completions import most_new_tokens
from pretrain.tasks.config import EvaluateOptions
from pretrain.tasks.likelihood import Subject
from pretrain.tasks.measure import WRITTEN, check_options, measure
from pretrain.tasks.records import Task, read_task
from pretrain.tasks.report import plot, replace_result, show, write
from pretrain.tasks.scores import Outcome

log = logging.getLogger(__name__)


def main(config: EvaluateConfig) -> None:
    """Print the table, and write it and its plot into <run.dir>/evaluation.

    Under torchrun or srun the rows, or the items of tasks, are shared among the ranks; the result
    is the same.
    """
    run_dir, options = Path(config.run.dir), config.evaluate
    tasks = [read_task(path, options.items) for path in options.tasks]
    check_options(tasks, options)
    # where the run was trained says nothing about where it is evaluated
    world = join(dataclasses.replace(thaw(run_dir).engine, device=Device.auto))
    trained = load_trained(run_dir, world.device, step=options.step)
    # of somebody else's run, say
    on_rank_0(world, lambda: try_folder(run_dir / "evaluation"))
    if tasks:
        _measure_tasks(run_dir, trained, world, tasks, options)
    else:
        _measure_held_out(run_dir, trained, world, options)
    leave(world)


def _measure_held_out(
    run_dir: Path, trained: Trained, world: World, options: EvaluateOptions
) -> None:
    data = trained.config.data
    check_is_here(run_dir, "data.shards", data.shards)
    check_same_data(trained.state, open_manifest(data).fingerprint, data.shards)
    held_out = valid_rows(data, rows=options.rows, rank=world.rank, ranks=world.size)
    with fixed_weights(trained.model):
        result = validate(trained.model, trained.config, world, held_out, depths=options.depths)
    if world.is_main:
        _report(run_dir, trained.step, result)


def _measure_tasks(
    run_dir: Path,
    trained: Trained,
    world: World,
    tasks: Sequence[Task],
    options: EvaluateOptions,
) -> None:
    check_is_here(run_dir, "tokenizer.path", trained.config.tokenizer.path)
    tokenizer = Tokenizer.load(trained.config.tokenizer.path)
    check_same_tokenizer(trained.state, tokenizer.sha256, trained.config.tokenizer.path)
    subject = Subject(
        model=trained.model,
        tokenizer=tokenizer,
        world=world,
        depths=tuple(options.depths),
        batch_tokens=trained.config.batch.micro_rows * trained.config.model.context,
    )
    if world.is_main:
        _warn_of_room(tasks, options, subject.context)
    folder = run_dir / "evaluation" / f"step-{trained.step:010d}"
    outcomes = []
    for task in tasks:
        outcomes.append(measure(subject, task, options))
        # a later task may fail: what is done stays
        if world.is_main:
            write(folder, outcomes[-1], trained.step)
    if world.is_main:
        title = f"{run_dir.name} at step {trained.step}"
        show(outcomes, title)
        _warn_of_cut(outcomes)
        picture = plot(folder / "score-by-depth.png", outcomes, title)
        print(f"written: {folder}\nplot:    {picture}")


def _warn_of_room(tasks: Sequence[Task], options: EvaluateOptions, context: int) -> None:
    room = most_new_tokens(context)
    if options.max_new_tokens > room and any(task.kind in WRITTEN for task in tasks):
        log.warning(
            "half of the context of %d is the prompt's: answers have at most %d tokens, not "
            "evaluate.max_new_tokens=%d",
            context,
            room,
            options.max_new_tokens,
        )


def _warn_of_cut(outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        if count := outcome.summary()["items_cut"]:
            log.warning(
                "%s: %d of %d items do not fit into the context; their beginnings were left out",
                outcome.name,
                count,
                len(outcome.items),
            )


def _report(run_dir: Path, step: int, result: dict[str, Any]) -> None:
    title = f"{run_dir.name} at step {step}: {result['validation/tokens']:,} held-out tokens"
    table = Table("depth", "loss (nats/token)", "perplexity", title=title)
    depths, losses = result["validation/depths"], result["validation/loss_nats"]
    for depth, loss in zip(depths, losses, strict=True):
        table.add_row(str(depth), f"{loss:.4f}", f"{math.exp(loss):.2f}")
    Console().print(table)
    folder = run_dir / "evaluation"
    path = folder / f"step-{step:010d}.json"
    replace_result(path, json.dumps({"step": step, **result}, indent=1) + "\n")
    plot = plot_depth_curve(path.with_suffix(".png"), depths, losses, title=title)
    print(f"written: {path}\nplot:    {plot}")
