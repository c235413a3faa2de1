"""One frame of `pretrain top`: a run as it is now, in a terminal."""

import math
import time
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pretrain.loop.console import format_duration, one_line
from pretrain.loop.lineage import FINISHED, Life
from pretrain.reporting.events import alarms, events
from pretrain.reporting.numbers import by_name, counted, in_percent, in_seconds
from pretrain.reporting.run import Run, end_of
from pretrain.reporting.thin import bucket_means
from pretrain.reporting.writing import Sample, of

_BLOCKS = "▁▂▃▄▅▆▇█"
_METRICS = (
    ("loss", "loss/nats"),
    ("gradient norm", "gradient/norm"),
    ("learning rate", "optimizer/learning_rate"),
    ("mean depth", "depth/mean"),
    ("tokens/s", "speed/tokens_per_s"),
    ("of the peak", "speed/mfu"),
    ("step", "speed/step_s"),
    ("data wait", "data/wait_s"),
    ("slowest rank", "ranks/slowest_ratio"),
    ("GPU busy", "gpu/utilization"),
    ("GPU power", "gpu/power_w"),
    ("GPU temperature", "gpu/temperature_c"),
    ("GPU clock", "gpu/clock_hz"),
    ("GPU memory", "memory/peak_bytes"),
    ("host memory", "memory/host_bytes"),
)
_SHOWN_LIVES, _SHOWN_EVENTS = 3, 4
_STATE_STYLES = {
    FINISHED: "bold green",
    "running": "bold green",
    "paused": "bold yellow",
    "not started": "bold yellow",
}
_EVENT_STYLES = {"bad": "red", "warn": "yellow", "note": "dim"}
# what is left of a panel's width for a curve
_FRAME_WIDTH = 48
# what is left for a sample
_SAMPLE_FRAME = 20


def frame(run: Run, *, width: int) -> RenderableType:
    """Everything about a run that changes, `width` columns wide."""
    parts: list[RenderableType] = [_progress(run), _metrics(run, max(10, width - _FRAME_WIDTH))]
    if run.record.validations:
        parts += [_validation(run), *_sample(run, width - _SAMPLE_FRAME)]
    parts += [_alarms(run), _saved(run), _lives(run), *_events(run)]
    title = Text.assemble((run.name, "bold"), "  ", (run.state, _state_style(run.state)))
    return Panel(Group(*parts), title=title, title_align="left", width=width, border_style="dim")


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as one line of blocks, old to new: means of equal parts; a gap has no finite."""
    means = bucket_means(values, width)
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return ""
    low, spread = min(finite), max(finite) - min(finite)
    top = len(_BLOCKS) - 1
    return "".join(
        _BLOCKS[round((mean - low) / spread * top) if spread else 0] if math.isfinite(mean) else " "
        for mean in means
    )


def _state_style(state: str) -> str:
    return _STATE_STYLES.get(state, "bold red")


def _progress(run: Run) -> RenderableType:
    line = Table.grid(padding=(0, 2), expand=True)
    line.add_column(ratio=1)
    line.add_column(justify="right", no_wrap=True)
    is_over = math.isnan(run.left_s) or run.state == FINISHED
    left = "" if is_over else f"{format_duration(run.left_s)} left, "
    age_s = time.time() - run.record.written_s
    seen = f"seen {format_duration(age_s)} ago" if run.record.written_s else "nothing yet"
    said = (
        f"step {run.record.step:,}/{run.last_step:,}  {run.record.tokens:,.0f} tokens  {left}{seen}"
    )
    line.add_row(ProgressBar(total=run.last_step, completed=run.record.step), said)
    return line


def _metrics(run: Run, curve_width: int) -> RenderableType:
    table = Table(box=None, padding=(0, 1), show_header=True, header_style="dim", expand=True)
    table.add_column("", no_wrap=True)
    table.add_column("now", justify="right", no_wrap=True)
    table.add_column("the whole run", ratio=1, no_wrap=True)
    for name, key in _METRICS:
        series = run.record.series.get(key)
        if series:
            shown = by_name(key, series.values[-1])
            table.add_row(name, shown, Text(sparkline(series.values, curve_width), style="cyan"))
    return table


def _validation(run: Run) -> Text:
    last = run.record.validations[-1]
    pairs = zip(last["validation/depths"], last["validation/loss_nats"], strict=True)
    shown = "  ".join(f"r={depth} {nats:.4f}" for depth, nats in pairs)
    ago = run.record.step - last["step"]
    when = f"{counted(ago, 'step')} ago" if ago else "now"
    return Text.assemble((f"held out at step {last['step']}, {when}  ", "dim"), shown)


def _sample(run: Run, width: int) -> list[Text]:
    """The newest text behind the first prompt at the largest depth, shortened."""
    newest: list[Sample] = next(filter(None, map(of, reversed(run.record.validations))), [])
    if not newest:
        return []
    first = [each for each in newest if each["prompt"] == newest[0]["prompt"]][-1]
    text = one_line(f"{first['prompt']}{first['text']}", max(10, width))
    return [Text.assemble((f"sample  r={first.get('depth', '?')}  ", "dim"), text)]


def _saved(run: Run) -> Text:
    step, written_s = (run.record.last(f"checkpoint/{name}") for name in ("step", "written_s"))
    if step is None:
        every = counted(run.config.checkpoint.every_steps, "step")
        return Text.assemble(("saved   ", "dim"), f"nothing yet, every {every}")
    took = f", written in {in_seconds(written_s)}" if written_s is not None else ""
    return Text.assemble(("saved   ", "dim"), f"step {step:,.0f}{took}")


def _alarms(run: Run) -> Text:
    lasting = [(name, began) for name, began, ended in alarms(run.record) if ended is None]
    if not lasting:
        return Text.assemble(("alarms  ", "dim"), "none")
    shown = ", ".join(f"{name} since step {began}" for name, began in lasting)
    return Text.assemble(("alarms  ", "dim"), (shown, "bold red"))


def _lives(run: Run) -> Text:
    shown = [_life(life, run) for life in run.lives[-_SHOWN_LIVES:]]
    more = len(run.lives) - len(shown)
    before = f"{more} earlier; " if more > 0 else ""
    share = run.goodput
    useful = f"; goodput {in_percent(share)}" if share is not None else ""
    return Text.assemble(("lives   ", "dim"), before + ("; ".join(shown) or "none yet") + useful)


def _life(life: Life, run: Run) -> str:
    is_last = life is run.lives[-1]
    end = run.state if is_last and life.ended_s is None else end_of(life)
    reached = run.record.step if is_last and life.last_step is None else life.last_step
    until = "?" if reached is None else str(reached)
    ranks = "1 rank" if life.ranks == 1 else f"{life.ranks} ranks"
    return f"{life.number}: steps {life.first_step} to {until}, {ranks}, {end}"


def _events(run: Run) -> list[Text]:
    """The gravest of what happened; alarms and ends of lives have lines of their own."""
    told = ("Alarm ", "Life ")
    found = [each for each in events(run) if not each[1].startswith(told)]
    return [Text(sentence, style=_EVENT_STYLES[grade]) for grade, sentence in found[:_SHOWN_EVENTS]]
