"""The parts of a page that are no curves: summary, data, lives, settings."""

import datetime
import json
import math
from collections.abc import Iterable, Sequence

from pretrain.compose import as_dict
from pretrain.loop.console import format_duration
from pretrain.loop.lineage import FINISHED
from pretrain.model.cost import count_parameters
from pretrain.reporting.charts import legend_key, run_colour
from pretrain.reporting.events import events
from pretrain.reporting.numbers import plain, scaled
from pretrain.reporting.run import Run, end_of, is_orderly
from pretrain.reporting.shares import rows_by_source
from pretrain.reporting.svg import text_of
from pretrain.reporting.tables import table

_GOOD_STATES = ("finished", "running", "paused", "not started")
_MOST_EVENTS = 30
_MOST_LIVES = 60


def section(title: str, *parts: str, is_grid: bool = False) -> str:
    """Parts under a heading; empty if none of them has anything to show."""
    inner = "".join(parts)
    if not inner:
        return ""
    body = grid(inner) if is_grid else inner
    return f"<section><h2>{text_of(title)}</h2>{body}</section>"


def grid(*parts: str) -> str:
    """Parts side by side where there is room; empty if all are."""
    inner = "".join(parts)
    return f'<div class="grid">{inner}</div>' if inner else ""


def summary(run: Run) -> str:
    """What a person asks first, as tiles, and what happened, as sentences."""
    tiles = "".join(
        f'<div class="tile"><span>{text_of(name)}</span><b>{text_of(value)}</b>'
        f"<small>{text_of(more)}</small></div>"
        for name, value, more in facts(run)
    )
    return f'<div class="tiles">{tiles}</div><h3>What happened</h3>{_happened(run)}'


def _happened(run: Run) -> str:
    found = events(run)
    if not found:
        return '<p class="quiet">Nothing out of the ordinary happened.</p>'
    items = [f'<li class="{grade}">{text_of(said)}</li>' for grade, said in found[:_MOST_EVENTS]]
    if len(found) > _MOST_EVENTS:
        items.append(f"<li>and {len(found) - _MOST_EVENTS} more</li>")
    return f'<ul class="events">{"".join(items)}</ul>'


def facts(run: Run) -> list[tuple[str, str, str]]:
    """Name, value, and what goes with it."""
    record, config = run.record, run.config
    parameters = sum(count_parameters(config.model).values())
    seconds = record.series.get("speed/step_s")
    speed = record.series.get("speed/tokens_per_s")
    share = run.goodput
    pace = f"{record.tokens / sum(seconds.values):,.0f}" if seconds else "–"
    return [
        ("loss", _nats(record.last("loss/nats")), "of the last step, nats per token"),
        ("held out", _nats(record.last("validation/loss_at_mean_nats")), "at the mean depth"),
        ("tokens", scaled(record.tokens), f"of {scaled(run.total_tokens)}"),
        ("steps", f"{record.step:,}", f"of {run.last_step:,}"),
        ("tokens/s", pace, f"last {scaled(speed.values[-1])}" if speed else "no step yet"),
        (
            "goodput",
            "–" if share is None else f"{share:.1%}",
            f"{len(run.lives)} {'life' if len(run.lives) == 1 else 'lives'}",
        ),
        ("model", scaled(parameters), f"parameters, {config.model.name}"),
        ("depth", plain(config.depth.mean), f"on average, {config.depth.law.value}"),
        (
            "time in steps",
            format_duration(sum(seconds.values)) if seconds else "–",
            "of those that count",
        ),
        ("data", config.data.name, f"rows of {config.data.context:,} tokens"),
    ]


def _nats(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if math.isfinite(value) else plain(value)


def state_badge(run: Run) -> str:
    """finished, running, ... with a colour."""
    grade = "good" if run.state in _GOOD_STATES else "bad"
    has_pace = run.state == "running" and not math.isnan(run.left_s)
    left = f", {format_duration(run.left_s)} left" if has_pace else ""
    return f'<span class="badge {grade}">{text_of(run.state + left)}</span>'


def comparison(runs: Sequence[Run]) -> str:
    """A row for each run, and what happened to each."""
    head = ["run", "state", *(name for name, _, _ in facts(runs[0]))]
    rows = [[run.name, run.state, *(value for _, value, _ in facts(run))] for run in runs]
    happened = "".join(
        f"<h3>What happened to {text_of(run.name)}</h3>{_happened(run)}" for run in runs
    )
    return table(head, rows, numbers=len(head) - 2) + happened


def data_shares(runs: Sequence[Run]) -> str:
    """Rows by source, as bars."""
    parts = []
    for run in runs:
        counts = rows_by_source(run)
        total = sum(counts.values())
        if not total:
            continue
        if len(runs) > 1:
            parts.append(f"<h3>{text_of(run.name)}</h3>")
        parts += [
            f'<div class="bar"><span>{text_of(name)}</span><i><b style="width:{count / total:.2%}">'
            f"</b></i><em>{count / total:.1%}</em><small>{count:,} rows</small></div>"
            for name, count in counts.items()
        ]
    return "".join(parts)


def lives(run: Run) -> str:
    """Each life on one axis of time, and a table with why it ended."""
    if not run.lives:
        return ""
    shown = run.lives[-_MOST_LIVES:]
    rows = [
        [
            str(life.number),
            moment(life.began_s),
            "–" if life.ended_s is None else format_duration(life.ended_s - life.began_s),
            f"{life.first_step} to {'?' if life.last_step is None else life.last_step}",
            end_of(life) if life.ended_s is not None or life is not run.lives[-1] else run.state,
            f"{life.ranks} on {_some(life.nodes)}",
            life.job_id or "–",
            "–" if life.goodput is None else f"{life.goodput:.1%}",
        ]
        for life in shown
    ]
    head = ["life", "began (UTC)", "lasted", "steps", "ended by", "ranks", "job", "goodput"]
    left_out = len(run.lives) - len(shown)
    note = f"<p class=quiet>{left_out} earlier lives are not shown.</p>" if left_out else ""
    return _timeline(run) + note + table(head, rows, numbers=1)


def _timeline(run: Run) -> str:
    """Bars on an axis from the first life's beginning to the last sign of life."""
    start, total = run.lives[0].began_s, max(run.seen_s - run.lives[0].began_s, 1e-9)
    bars = []
    for index, life in enumerate(run.lives):
        is_last = index == len(run.lives) - 1
        unknown_end = run.seen_s if is_last else run.lives[index + 1].began_s
        end = unknown_end if life.ended_s is None else life.ended_s
        left, width = (life.began_s - start) / total, max((end - life.began_s) / total, 0.002)
        reason = run.state if is_last and life.ended_s is None else end_of(life)
        if life.ended_s is None:
            grade = "good" if reason == "running" else "unknown"
        else:
            grade = _grade(life.reason)
        title = f"life {life.number}: {moment(life.began_s)} UTC, {reason}"
        shown = text_of(f"{life.number} · {reason}") if width > 0.12 else ""
        bars.append(
            f'<span class="{grade}" style="left:{left:.3%};width:{width:.3%}" '
            f'title="{text_of(title)}">{shown}</span>'
        )
    return (
        f'<div class="timeline">{"".join(bars)}</div><p class="ends"><span>{moment(start)}</span>'
        f"<span>{format_duration(total)} in all</span><span>{moment(run.seen_s)}</span></p>"
    )


def _grade(reason: str) -> str:
    if reason == FINISHED:
        return "good"
    return "warn" if is_orderly(reason) else "bad"


def moment(seconds: float) -> str:
    """Seconds since 1970 as a date, UTC."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def _some(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def environment(runs: Sequence[Run]) -> str:
    """Where the runs ran and by what code; what their settings do not share; all settings."""
    rows = [[run.name, *_place(run)] for run in runs]
    parts = [
        table(["run", "folder", "ranks", "engine", "seed", "code"], rows),
        "<h3>Software and devices of the newest life</h3>",
        _software(runs),
    ]
    settings = [dict(_leaves(as_dict(run.config))) for run in runs]
    keys = sorted({key for each in settings for key in each})
    if len(runs) > 1:
        unlike = [key for key in keys if len({each.get(key, "–") for each in settings}) > 1]
        parts.append("<h3>Settings that differ</h3>")
        parts.append(_settings(runs, settings, unlike))
    every = _settings(runs[:1], settings[:1], sorted(settings[0]))
    parts.append(f"<details><summary>All settings of {text_of(runs[0].name)}</summary>{every}")
    return "".join([*parts, "</details>"])


def _software(runs: Sequence[Run]) -> str:
    """Versions by name, a column for each run."""
    known = [_versions(run) for run in runs]
    names = list(dict.fromkeys(name for each in known for name in each))
    rows = [[name, *(each.get(name, "–") for each in known)] for name in names]
    none = '<p class="quiet">The run has left no word of it.</p>'
    return table(["", *(run.name for run in runs)], rows) or none


def _versions(run: Run) -> dict[str, str]:
    software, devices = run.origin.get("software"), run.origin.get("devices")
    found = {str(n): str(v) for n, v in software.items()} if isinstance(software, dict) else {}
    if isinstance(devices, dict):
        found["devices"] = ", ".join(f"{count} x {name}" for name, count in devices.items())
    return found


def _settings(runs: Sequence[Run], settings: Sequence[dict[str, str]], keys: list[str]) -> str:
    names = [run.name for run in runs]
    return table(["setting", *names], ([key, *(s.get(key, "–") for s in settings)] for key in keys))


def _place(run: Run) -> list[str]:
    config, last = run.config, run.lives[-1] if run.lives else None
    # a job's copies tell of all lives, the origin of the newest
    sources = run.snapshots or [run.origin]
    commits = [
        str(each["commit"])[:12] + (" and changes" if each.get("diff_sha256") else "")
        for each in sources
        if each.get("commit")
    ]
    engine = config.engine
    return [
        str(run.folder),
        "–" if last is None else f"{last.ranks} on {_some(last.nodes)}",
        f"ZeRO-{engine.zero_stage}, {engine.precision.value}, {config.model.path.value}",
        str(config.run.seed),
        ", ".join(commits) or "unknown",
    ]


def _leaves(value: object, key: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, value if isinstance(value, str) else json.dumps(value)


def colours(runs: Sequence[Run]) -> str:
    """The names of compared runs in their colours."""
    return "".join(legend_key(run.name, run_colour(index)) for index, run in enumerate(runs))
