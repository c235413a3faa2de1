"""The command `pretrain replay`: one step's batch again, row by row, to see what was wrong with it.

Rows, depths and initial states are pure functions of the run's configuration and of the step's
first global row, which the record has. The weights are those that the step began with if they are
at hand: a step without an update leaves them in its own checkpoint (guards.save_on_skip).
"""

import dataclasses
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pretrain.compose import thaw
from pretrain.config import ReplayConfig, TrainConfig
from pretrain.data.inspect import spell
from pretrain.data.loader import Batch, stream_batches
from pretrain.data.progress import Progress
from pretrain.data.store import open_manifest, train_order
from pretrain.data.tokenizer import Tokenizer
from pretrain.engine import commit
from pretrain.engine.checkpoint import read_state
from pretrain.engine.config import Device
from pretrain.engine.world import World, join, leave
from pretrain.errors import CheckpointError, ConfigError
from pretrain.loop.metrics import read_metrics
from pretrain.loop.micro_batches import micro_batches
from pretrain.loop.run_folder import on_rank_0, try_folder
from pretrain.loop.state import check_same_data
from pretrain.loop.trained import Trained, load_trained
from pretrain.model.depth import Depth, step_depths
from pretrain.model.loss import IGNORED

log = logging.getLogger(__name__)

SHOWN_ROWS = 12
PREVIEW_TOKENS = 24


class RowResult(NamedTuple):
    """What one row did to the step."""

    row: int
    """Its global row."""
    source: str
    shard: int
    place: int
    """Its row in the shard."""
    epoch: int
    depth: int
    labels: int
    nats: float
    """Summed over its labels."""
    gradient_norm: float
    """L2 norm of its part of the step's gradient, had it been alone: nats over its own labels."""
    begins: str
    """Its first tokens."""


def main(config: ReplayConfig) -> None:
    """Print the rows with the largest losses, and write all of them into <run.dir>/replay.

    Under torchrun or srun the rows are shared among the ranks.
    """
    run_dir = Path(config.run.dir)
    frozen = thaw(run_dir)
    record = find_record(run_dir, config.step)
    world = join(dataclasses.replace(frozen.engine, device=Device.auto))
    first_row, rows = int(record["data/first_row"]), int(record["data/rows"])
    wanted = _wanted(config.rows, first_row, rows)
    trained = load_trained(run_dir, world.device, step=weights_before(run_dir, config.step))
    on_rank_0(world, lambda: try_folder(run_dir / "replay"))
    check_same_data(trained.state, open_manifest(frozen.data).fingerprint, str(frozen.data.shards))
    results = _replay(trained, world, wanted, first_row=first_row, rows=rows)
    everyone = [result for part in world.gather_objects(results) for result in part]
    everyone.sort(key=lambda result: result.row)
    if world.is_main:
        _report(run_dir, config.step, record, trained, everyone)
    leave(world)


def find_record(run_dir: Path, step: int) -> dict[str, Any]:
    """What the run recorded of a step, also of one that it took back.

    Raises CheckpointError if the run never took it.
    """
    for name in ("metrics.jsonl", "metrics.discarded.jsonl"):
        if not (run_dir / name).is_file():
            continue
        for record in reversed(read_metrics(run_dir / name)):
            if record["step"] == step and "data/first_row" in record:
                return record
    raise CheckpointError(f"{run_dir}/metrics.jsonl has no step {step}; the run has not taken it.")


def weights_before(run_dir: Path, step: int) -> int:
    """The step of the checkpoint whose weights are those that `step` began with, or nearest to it.

    Nearest is the last one before it, or the first one behind it if those before are gone. Says
    which. Raises CheckpointError if the run has none.
    """
    steps = {commit.step_of(folder): folder for folder in commit.committed(run_dir)}
    if step in steps and read_state(steps[step])["train"]["skipped_in_a_row"] > 0:
        log.info("weights: the checkpoint of step %d, which made no update", step)
        return step
    saved = [each for each in steps if each is not None]
    if not saved:
        raise CheckpointError(f"{run_dir} has no checkpoint, so there are no weights to run with.")
    nearest = max((each for each in saved if each < step), default=min(saved))
    updates = abs(step - 1 - nearest)
    away = f"{updates} update{'s' * (updates != 1)}"
    if updates == 0:
        log.info("weights: the checkpoint of step %d, exactly those of the step", nearest)
    elif nearest < step:
        log.warning(
            "weights: the checkpoint of step %d, %s before the step; losses will differ",
            nearest,
            away,
        )
    else:
        log.warning(
            "weights: the checkpoint of step %d, %s after the step began, since none from before "
            "is kept; losses will differ",
            nearest,
            away,
        )
    return nearest


def _wanted(asked: list[int], first_row: int, rows: int) -> list[int]:
    there = range(first_row, first_row + rows)
    if outside := [row for row in asked if row not in there]:
        raise ConfigError(
            f"rows={outside} are not of this step: it had rows {there.start} to {there.stop - 1}."
        )
    return sorted(asked) or list(there)


def _replay(
    trained: Trained, world: World, wanted: list[int], *, first_row: int, rows: int
) -> list[RowResult]:
    """This rank's share of the wanted rows."""
    config = trained.config
    manifest = open_manifest(config.data)
    order = train_order(config.data, manifest, config.run.seed)
    tokenizer = Tokenizer.load(config.tokenizer.path)
    depths = step_depths(config.depth, seed=config.run.seed, first_row=first_row, rows=rows)
    trained.model.train()
    trained.model.kept_iterations = config.engine.model_kept_iterations
    mine = wanted[world.rank :: world.size]
    results = []
    with Progress("replay", total=len(mine)) as progress:
        for batch in _read(config, mine):
            row = batch.first_row
            address, depth = order.address(row), depths[row - first_row]
            nats, labels, norm = _forward_and_backward(trained, world, batch, depth)
            results.append(
                RowResult(
                    row=row,
                    source=manifest.sources[address.source].name,
                    shard=address.shard,
                    place=address.row,
                    epoch=address.epoch,
                    depth=depth.total,
                    labels=labels,
                    nats=nats,
                    gradient_norm=norm,
                    begins=spell(tokenizer, batch.tokens_BS[0, :PREVIEW_TOKENS].tolist()),
                )
            )
            progress.advance()
    return results


def _read(config: TrainConfig, rows: list[int]) -> Iterator[Batch]:
    """Rows one by one, ascending, read and verified as training reads them."""
    if not rows:
        return
    data = dataclasses.replace(config.data, loader_workers=0)
    batches = stream_batches(
        data, seed=config.run.seed, first_row=rows[0], rows_per_step=1, rank=0, ranks=1
    )
    wanted = set(rows)
    for batch in batches:
        if batch.first_row in wanted:
            yield batch
        if batch.first_row == rows[-1]:
            break
    batches.close()  # type: ignore[attr-defined]


def _forward_and_backward(
    trained: Trained, world: World, batch: Batch, depth: Depth
) -> tuple[float, int, float]:
    """Nats of a row, its labels, and the norm of the gradient of its mean."""
    config, model = trained.config, trained.model
    (micro,) = micro_batches(
        batch,
        [depth],
        model=config.model,
        micro_rows=1,
        seed=config.run.seed,
        device=world.device,
    )
    model.zero_grad(set_to_none=True)
    output = model(
        micro.tokens_BT,
        micro.depths,
        initial_state=micro.initial_state_BTD,
        labels=micro.labels_BT,
        documents=micro.documents_BT,
        digit_shift=micro.digit_shift_B,
        keep_logits=False,
    )
    assert output.nats is not None
    labels = max(int((micro.labels_BT != IGNORED).sum()), 1)
    (output.nats / labels).backward()
    squares = [
        p.grad.double().square().sum().item() for p in model.parameters() if p.grad is not None
    ]
    return float(output.nats.detach()), labels, math.sqrt(sum(squares))


def _report(
    run_dir: Path, step: int, record: dict[str, Any], trained: Trained, results: list[RowResult]
) -> None:
    nats, labels = sum(r.nats for r in results), sum(r.labels for r in results)
    title = (
        f"{run_dir.name}, step {step}: {len(results)} rows, {nats / max(labels, 1):.6f} nats/token "
        f"with the weights of step {trained.step}; the run recorded {record['loss/nats']:.6f}"
    )
    table = Table(title=title, title_justify="left")
    for name in ("row", "source", "shard:row", "epoch", "depth", "nats/token", "gradient"):
        table.add_column(name, justify="left" if name == "source" else "right")
    table.add_column("begins")
    # what is not a number first
    worst = sorted(results, key=lambda r: np.nan_to_num(-r.nats / max(r.labels, 1), nan=-np.inf))
    for r in worst[:SHOWN_ROWS]:
        table.add_row(
            str(r.row), r.source, f"{r.shard}:{r.place}", str(r.epoch), str(r.depth),
            f"{r.nats / max(r.labels, 1):.4f}", f"{r.gradient_norm:.3g}", escape(repr(r.begins)),
        )  # fmt: skip
    Console().print(table)
    bad = [
        r.row for r in results if not math.isfinite(r.nats) or not math.isfinite(r.gradient_norm)
    ]
    if bad:
        print(f"rows whose loss or gradient is not finite: {', '.join(map(str, bad))}")
    path = run_dir / "replay" / f"step-{step:010d}.json"
    lines = [json.dumps(_plain(result)) for result in results]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    print(f"written: {path}")


def _plain(result: RowResult) -> dict[str, Any]:
    """A row as JSON has it: a number that is not finite becomes its name."""
    return {
        key: value if not isinstance(value, float) or math.isfinite(value) else str(value)
        for key, value in result._asdict().items()
    }
