"""What tasks gave, as files, a table and a picture: scores against depth with standard errors."""

import itertools
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter
from rich.console import Console
from rich.table import Table

from pretrain.tasks.records import Kind
from pretrain.tasks.scores import Outcome, Score

log = logging.getLogger(__name__)

_WIDEST = 1_000


def show(outcomes: Sequence[Outcome], title: str) -> None:
    """Print every measure of every task in a row, a column for each depth."""
    found = Table(title=title)
    for name in ("task", "items", "measure", *(f"r={depth}" for depth in outcomes[0].depths)):
        found.add_column(name, no_wrap=True)
    for outcome in outcomes:
        for name, scores in outcome.scores.items():
            found.add_row(outcome.name, str(len(outcome.items)), name, *map(_cell, scores))
    console = Console()
    # numbers are never shortened: a line that is too long for the terminal is a smaller evil
    wanted = Console(width=_WIDEST).measure(found).maximum
    Console(width=max(console.width, wanted)).print(found)


def write(folder: Path, outcome: Outcome, step: int) -> None:
    """TASK.jsonl, one line an item, and TASK.json, the scores; each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(item, ensure_ascii=False) for item in outcome.items]
    replace_result(folder / f"{outcome.name}.jsonl", "\n".join(lines) + "\n")
    summary = {"step": step, **outcome.summary()}
    replace_result(folder / f"{outcome.name}.json", json.dumps(summary, indent=1) + "\n")


def replace_result(path: Path, text: str) -> None:
    """Write a result, whole or not at all; another one that was there goes to `earlier/`."""
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        folder = path.parent / "earlier"
        folder.mkdir(exist_ok=True)
        names = (f"{path.stem}-{number}{path.suffix}" for number in itertools.count(1))
        kept = next(folder / name for name in names if not (folder / name).exists())
        path.rename(kept)
        log.info("what was in %s is now %s", path, kept)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def plot(path: Path, outcomes: Sequence[Outcome], title: str) -> Path:
    """The first measure of each task against depth; shares and nats have axes of their own."""
    by_nats = [outcome for outcome in outcomes if outcome.kind is Kind.perplexity]
    by_share = [outcome for outcome in outcomes if outcome.kind is not Kind.perplexity]
    groups = [
        (group, label)
        for group, label in ((by_share, "share of items that are right"), (by_nats, "nats / token"))
        if group
    ]
    figure = Figure(figsize=(8.5, 4.2 * len(groups)), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for at, (group, label) in enumerate(groups):
        axes = figure.add_subplot(len(groups), 1, at + 1)
        for outcome in group:
            _draw(axes, outcome)
        axes.set_ylabel(label)
        _finish(axes, outcomes[0].depths)
    figure.savefig(path, dpi=150)
    return path


def _draw(axes: Axes, outcome: Outcome) -> None:
    scores = sorted(zip(outcome.depths, outcome.scores[outcome.measure], strict=True))
    axes.errorbar(
        [depth for depth, _ in scores],
        [score.value for _, score in scores],
        yerr=[score.error or 0.0 for _, score in scores],
        marker="o",
        markersize=4,
        linewidth=1.5,
        capsize=3,
        label=f"{outcome.name} ({len(outcome.items)})",
    )


def _finish(axes: Axes, depths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(depths)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel("depth (iterations of the core); bars: one standard error")
    axes.grid(color="#e4e7eb", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _cell(score: Score) -> str:
    return f"{score.value:.3f}" if score.error is None else f"{score.value:.3f} ± {score.error:.3f}"
