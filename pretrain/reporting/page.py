"""One run, or several, as one HTML file that needs nothing else: no script, no request."""

import time
from collections.abc import Sequence

from pretrain.reporting import sections
from pretrain.reporting.charts import (
    depth_charts,
    list_charts,
    loss_chart,
    metric_charts,
    other_charts,
)
from pretrain.reporting.depths import depth_chart
from pretrain.reporting.run import Run
from pretrain.reporting.scores import score_charts, score_table
from pretrain.reporting.sections import grid, section
from pretrain.reporting.shares import epochs_spec
from pretrain.reporting.specs import OPTIMIZATION, RECURRENCE, RESOURCES, SENSORS, SPEED
from pretrain.reporting.style import STYLE
from pretrain.reporting.svg import text_of
from pretrain.reporting.tables import table
from pretrain.reporting.writing import samples

# Whatever a run's name or settings hold, nothing on the page runs and nothing is fetched.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render(runs: Sequence[Run], *, states: Sequence[str] = ()) -> str:
    """The page of the first run, with the others drawn over it; `states`: figures of its states."""
    body = [
        _header(runs),
        sections.summary(runs[0]) if len(runs) == 1 else sections.comparison(runs),
        section("Learning", loss_chart(runs), *depth_charts(runs), is_grid=True),
        section("Tasks", grid(*score_charts(runs)), score_table(runs)),
        section("Samples", samples(runs)),
        section("Recurrence", *_recurrence(runs), is_grid=True),
        section("States", *states, is_grid=True),
        section("Optimization", *metric_charts(OPTIMIZATION, runs), is_grid=True),
        section("Speed", *metric_charts(SPEED, runs), is_grid=True),
        section("Memory and checkpoints", *metric_charts(RESOURCES, runs), is_grid=True),
        section("GPUs", *metric_charts(SENSORS, runs), is_grid=True),
        section("Data", sections.data_shares(runs), grid(*_epochs(runs))),
        *_lives(runs),
        *_others(runs),
        section("Environment", sections.environment(runs)),
    ]
    title = " and ".join(run.name for run in runs)
    written = sections.moment(time.time())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # a page without an icon of its own would ask its server for one
        '<link rel="icon" href="data:,">'
        f"<title>{text_of(title)}</title><style>{STYLE}</style></head><body><main>"
        f"{''.join(body)}<footer>Written {written} UTC by pretrain report, from the run folder "
        "alone. Point at a curve for its values.</footer></main></body></html>\n"
    )


def _header(runs: Sequence[Run]) -> str:
    run = runs[0]
    if len(runs) > 1:
        return (
            f"<header><h1>{len(runs)} runs</h1>"
            f'<span class="keys">{sections.colours(runs)}</span></header>'
        )
    said = f"{run.config.model.name} on {run.config.data.name}, {run.folder}"
    return (
        f"<header><h1>{text_of(run.name)}</h1>{sections.state_badge(run)}"
        f'<p class="sub">{text_of(said)}</p></header>'
    )


def _recurrence(runs: Sequence[Run]) -> list[str]:
    return [depth_chart(runs), *metric_charts(RECURRENCE, runs), *list_charts(runs)]


def _epochs(runs: Sequence[Run]) -> list[str]:
    return metric_charts([epochs_spec(runs[0])], runs) if len(runs) == 1 else []


def _lives(runs: Sequence[Run]) -> list[str]:
    if len(runs) == 1:
        return [section("Lives", sections.lives(runs[0]))]
    return [section(f"Lives of {run.name}", sections.lives(run)) for run in runs]


def _others(runs: Sequence[Run]) -> list[str]:
    figures, constant = other_charts(runs)
    listed = table(["metric", "value"], constant, numbers=1)
    inner = f"<details><summary>Metrics that never changed</summary>{listed}</details>"
    return [
        section("Further metrics", *figures, is_grid=True),
        inner if constant else "",
    ]
