"""Which curves a page has, from the columns of one run or of several over one another."""

import math
from collections.abc import Sequence
from functools import partial

from pretrain.loop.plots import smooth
from pretrain.reporting.numbers import by_name, scaled
from pretrain.reporting.record import Series
from pretrain.reporting.run import Run
from pretrain.reporting.scale import Kind
from pretrain.reporting.specs import (
    EPOCHS,
    LISTS,
    NOT_CURVES,
    OPTIMIZATION,
    RECURRENCE,
    RESOURCES,
    SENSORS,
    SHARE,
    SPEED,
    Spec,
)
from pretrain.reporting.svg import Chart, Line, Mark, draw, text_of

WIDE, TALL = 1080, 380
_BAD, _QUIET = "var(--bad)", "var(--muted)"
_RUN_COLOURS, _DEPTH_COLOURS = 6, 8
# Earlier validations behind the last one's depth curve.
_EARLIER = 12


# A record may have any number of metrics; a page has so many more curves and names the rest.
_MOST_OTHERS = 40


def run_colour(index: int) -> str:
    """The colour of a run among those compared."""
    return f"var(--r{index % _RUN_COLOURS})"


def depth_colour(index: int, count: int) -> str:
    """From shallow to deep, and from early to late."""
    return f"var(--d{round(index / max(1, count - 1) * (_DEPTH_COLOURS - 1))})"


def figure(title: str, svg: str, *, note: str = "", keys: str = "", is_wide: bool = False) -> str:
    """A titled chart; empty if there is nothing to draw. `title` and `note` are plain text."""
    if not svg:
        return ""
    said = f'<span class="note">{text_of(note)}</span>' if note else ""
    classes = ' class="wide"' if is_wide else ""
    return (
        f"<figure{classes}><figcaption><b>{text_of(title)}</b>{said}{keys}</figcaption>"
        f"{svg}</figure>"
    )


def loss_chart(runs: Sequence[Run]) -> str:
    """Loss against tokens: training, and held out at each depth (of several: the mean depth)."""
    lines = _one_loss(runs[0]) if len(runs) == 1 else _many_losses(runs)
    chart = Chart(
        lines=lines,
        marks=event_marks(runs[0]) if len(runs) == 1 else (),
        x_label="tokens",
        show_x=scaled,
        width=WIDE,
        height=TALL,
        description="loss in nats per token against tokens",
    )
    return figure(
        "Loss against tokens",
        draw(chart),
        note="nats per token; thin: each step, thick: smoothed",
        keys=legend([line for line in lines if line.label]),
        is_wide=True,
    )


def _one_loss(run: Run) -> list[Line]:
    lines = _training(run, "var(--train)", "training, random depth")
    taken_back = run.discarded.series.get("loss/nats")
    if taken_back:
        lines.append(
            Line(
                x=taken_back.tokens,
                y=taken_back.values,
                colour=_BAD,
                label="taken back",
                is_faint=True,
                is_dots_only=True,
            )
        )
    depths = sorted({int(depth) for each in run.record.validations for depth in _depths(each)})
    for index, depth in enumerate(depths):
        x, y = _held_out(run, depth)
        colour = depth_colour(index, len(depths))
        lines.append(Line(x=x, y=y, colour=colour, label=f"held out, depth {depth}", has_dots=True))
    return lines


def _many_losses(runs: Sequence[Run]) -> list[Line]:
    lines = []
    for index, run in enumerate(runs):
        lines += _training(run, run_colour(index), run.name)
    for index, run in enumerate(runs):
        series = run.record.series.get("validation/loss_at_mean_nats", Series())
        lines.append(
            Line(
                x=series.tokens,
                y=series.values,
                colour=run_colour(index),
                label=f"{run.name}, held out at its mean depth" if series else "",
                is_dashed=True,
                has_dots=True,
            )
        )
    return lines


def _training(run: Run, colour: str, label: str) -> list[Line]:
    series = run.record.series.get("loss/nats", Series())
    smoothed = smooth(series.values).tolist() if series else []
    return [
        Line(x=series.tokens, y=series.values, colour=colour, is_faint=True),
        Line(x=series.tokens, y=smoothed, colour=colour, label=label),
    ]


def _held_out(run: Run, depth: int) -> tuple[list[float], list[float]]:
    found = [
        (float(each.get("tokens", 0)), float(nats))
        for each in run.record.validations
        for other, nats in zip(_depths(each), each["validation/loss_nats"], strict=True)
        if other == depth
    ]
    return [x for x, _ in found], [y for _, y in found]


def _depths(record: dict[str, list[int]]) -> list[int]:
    return record["validation/depths"]


def depth_charts(runs: Sequence[Run]) -> list[str]:
    """Held-out loss against depth: of the last validations, on the way there, and evaluated.

    Each has axes of its own: what depth gains is small beside what training gains.
    """
    last = [
        _depth_line(each, run_colour(index), label=run.name)
        for index, run in enumerate(runs)
        for each in run.record.validations[-1:]
    ]
    evaluated = [
        _depth_line(each, run_colour(index), label=f"{run.name}, step {each['step']}")
        for index, run in enumerate(runs)
        for each in run.evaluations[-1:]
    ]
    moment = f"after {scaled(runs[0].record.tokens)} tokens" if len(runs) == 1 else ""
    return [
        _depth_figure("Held-out loss against depth", moment, last),
        _depth_figure("On the way there", "", _earlier(runs[0]) if len(runs) == 1 else []),
        _depth_figure("Evaluated", "by pretrain evaluate, on rows of its own choice", evaluated),
    ]


def _depth_figure(title: str, note: str, lines: Sequence[Line]) -> str:
    ticks = sorted({value for line in lines for value in line.x})
    chart = Chart(
        lines=lines,
        x_label="depth (iterations of the core)",
        x_kind=Kind.log2,
        x_ticks=ticks[:: 1 + len(ticks) // 10],
        is_labelled=len(lines) == 1,
        description=f"{title}: nats per token against depth",
    )
    said = "; ".join(part for part in ("nats per token", note) if part)
    return figure(title, draw(chart), note=said, keys=legend(lines) if len(lines) > 1 else "")


def _earlier(run: Run) -> list[Line]:
    """Some of the validations before the last, and the last."""
    validations = run.record.validations
    stride = 1 + max(0, len(validations) - 1) // _EARLIER
    shown = validations[::-1][::stride][::-1]
    lines = []
    for index, each in enumerate(shown):
        is_end = index in (0, len(shown) - 1)
        label = f"{scaled(each.get('tokens', 0))} tokens" if is_end else ""
        colour = depth_colour(index, len(shown))
        lines.append(_depth_line(each, colour, label=label))
    return lines if len(lines) > 1 else []


def _depth_line(record: dict[str, list[float]], colour: str, *, label: str) -> Line:
    points = sorted(zip(record["validation/depths"], record["validation/loss_nats"], strict=True))
    return Line(
        x=[depth for depth, _ in points],
        y=[nats for _, nats in points],
        colour=colour,
        label=label,
        has_dots=True,
    )


def event_marks(run: Run) -> list[Mark]:
    """Where later lives began and where the run went back, on an axis of tokens."""
    marks = [
        Mark(
            x=run.tokens_at(life.first_step),
            label=f"life {life.number} begins at step {life.first_step}",
            colour=_QUIET,
        )
        for life in run.lives[1:]
    ]
    marks += [
        Mark(
            x=run.tokens_at(rewind.to_step),
            label=f"went back here from step {rewind.from_step}",
            colour=_BAD,
        )
        for rewind in run.rewinds
    ]
    return marks


def metric_charts(specs: Sequence[Spec], runs: Sequence[Run]) -> list[str]:
    """The charts that the runs have metrics for."""
    return [found for spec in specs if _changes(spec, runs) and (found := _draw(spec, runs))]


def _changes(spec: Spec, runs: Sequence[Run]) -> bool:
    return any(len(_distinct(key, runs)) > 1 for key in spec.keys)


def _distinct(key: str, runs: Sequence[Run]) -> set[float]:
    """No value, one that never changes, or the least and the largest."""
    return {value for run in runs for value in _extremes(run.record.series.get(key))}


def _draw(spec: Spec, runs: Sequence[Run]) -> str:
    lines = []
    if len(runs) == 1:
        for index, (key, label) in enumerate(zip(spec.keys, spec.labels, strict=True)):
            lines += _metric_lines(runs[0], key, run_colour(index), label)
    else:
        for index, run in enumerate(runs):
            lines += _metric_lines(run, spec.keys[0], run_colour(index), run.name)
    chart = Chart(
        lines=lines,
        marks=event_marks(runs[0]) if len(runs) == 1 else (),
        x_label="tokens",
        y_kind=spec.kind,
        show_x=scaled,
        show_y=partial(by_name, spec.keys[0]),
        description=f"{spec.title} against tokens",
    )
    keys = legend(lines) if len(spec.keys) > 1 and len(runs) == 1 else ""
    return figure(spec.title, draw(chart), note=_note(spec, runs), keys=keys)


def list_charts(runs: Sequence[Run]) -> list[str]:
    """Curves inside the runs' last validations."""
    found = []
    for title, key, places, x_label, note in LISTS:
        lines = [
            Line(x=x, y=y, colour=run_colour(index), label=run.name, has_dots=True)
            for index, run in enumerate(runs)
            for x, y in _last_list(run, key, places)
        ]
        chart = Chart(
            lines=lines,
            x_label=x_label,
            x_kind=Kind.linear if places is None else Kind.log2,
            x_ticks=() if places is None else sorted({value for line in lines for value in line.x}),
            y_kind=Kind.log,
            description=f"{title}, against {x_label}",
        )
        found.append(figure(title, draw(chart), note=note))
    return found


def _last_list(
    run: Run, key: str, places: str | None
) -> list[tuple[Sequence[float], Sequence[float]]]:
    """Places and values of a list in the last validation that has it; empty if none does."""
    for each in reversed(run.record.validations):
        y = each.get(key)
        if isinstance(y, list) and y:
            x = list(range(1, len(y) + 1)) if places is None else each.get(places, [])
            return [(x, y)] if len(x) == len(y) else []
    return []


def _metric_lines(run: Run, key: str, colour: str, label: str) -> list[Line]:
    series = run.record.series.get(key)
    if not series:
        return []
    return [
        Line(
            x=series.tokens, y=series.values, colour=colour, label=label, has_dots=len(series) < 40
        )
    ]


def _note(spec: Spec, runs: Sequence[Run]) -> str:
    last = runs[0].record.last(spec.keys[0]) if len(runs) == 1 else None
    shown = "" if last is None else f"last {by_name(spec.keys[0], last)}"
    return "; ".join(part for part in (shown, spec.note) if part)


def other_charts(runs: Sequence[Run]) -> tuple[list[str], list[tuple[str, str]]]:
    """Curves of every metric that no chart above has, and those that never changed, by value."""
    shown = (*SPEED, *OPTIMIZATION, *RECURRENCE, *RESOURCES, *SENSORS)
    drawn = {key for spec in shown if _changes(spec, runs) for key in spec.keys}
    keys = sorted({key for run in runs for key in run.record.series} - drawn - NOT_CURVES)
    # the section about data has them; runs that are compared keep epochs, a chart for each
    told = (SHARE, EPOCHS) if len(runs) == 1 else (SHARE,)
    keys = [key for key in keys if not key.startswith(told)]
    specs: list[Spec] = []
    constant: list[tuple[str, str]] = []
    for key in keys:
        values = sorted(_distinct(key, runs))
        if len(values) <= 1:
            constant.append((key, by_name(key, values[0]) if values else "not a number"))
        elif len(specs) < _MOST_OTHERS:
            specs.append(Spec(key, (key,)))
        else:
            constant.append((key, "changes; not drawn"))
    return metric_charts(specs, runs), constant


def _extremes(series: Series | None) -> list[float]:
    finite = [value for value in series.values if math.isfinite(value)] if series else []
    return [min(finite), max(finite)] if finite else []


def legend(lines: Sequence[Line]) -> str:
    """The labels of lines, each once, with their colours."""
    shown = dict.fromkeys((line.label, line.colour, line.is_dashed) for line in lines if line.label)
    items = [legend_key(*each) for each in shown]
    return f'<span class="keys">{"".join(items)}</span>' if items else ""


def legend_key(label: str, colour: str, is_dashed: bool = False) -> str:
    """A colour and what it stands for."""
    kind = ' class="dashes"' if is_dashed else ""
    mark = f'<i{kind} style="color:{colour}"></i>'
    return f'<span class="key">{mark}{text_of(label)}</span>'
