"""What happened to a run, in sentences."""

from collections import Counter

import numpy as np

from pretrain.loop.alarms import REMEDIES
from pretrain.loop.lineage import FINISHED, Life
from pretrain.reporting.numbers import counted
from pretrain.reporting.record import RunRecord
from pretrain.reporting.run import Run, end_of, is_orderly


def events(run: Run) -> list[tuple[str, str]]:
    """Sentences with how grave each is: bad, warn or note; gravest first."""
    found = [*_record_events(run.record), *_folder_events(run)]
    order = ("bad", "warn", "note")
    return sorted(found, key=lambda each: order.index(each[0]))


def alarms(record: RunRecord) -> list[tuple[str, int, int | None]]:
    """Each time an alarm was on: its name, the step it began at, and the one it ended at."""
    spans: list[tuple[str, int, int | None]] = []
    for name in REMEDIES:
        series = record.series.get(f"alarm/{name}")
        began: int | None = None
        for step, value in zip(series.steps, series.values, strict=True) if series else ():
            if value and began is None:
                began = step
            elif not value and began is not None:
                spans.append((name, began, step))
                began = None
        if began is not None:
            spans.append((name, began, None))
    return sorted(spans, key=lambda span: span[1])


def _record_events(record: RunRecord) -> list[tuple[str, str]]:
    found = []
    for name, began, ended in alarms(record):
        until = f"to {ended}" if ended is not None else "on, and it lasts"
        found.append(
            ("bad" if ended is None else "warn", f"Alarm {name} from step {began} {until}")
        )
    for key, what in (
        ("loss/spikes", "loss spike"),
        ("optimizer/skipped_updates", "skipped update"),
        ("data/lost_rows", "lost row"),
    ):
        if count := record.last(key):
            found.append(("warn", counted(count, what)))
    if losses := record.series.get("loss/nats"):
        bad = np.flatnonzero(~np.isfinite(np.asarray(losses.values)))
        if len(bad):
            first = losses.steps[int(bad[0])]
            found.append(
                ("bad", f"The loss was not finite in {counted(len(bad), 'step')}, first in {first}")
            )
    if record.num_damaged:
        found.append(
            ("warn", f"{counted(record.num_damaged, 'damaged line')} of metrics.jsonl left out")
        )
    return found


def _folder_events(run: Run) -> list[tuple[str, str]]:
    found = [
        (
            "bad",
            f"Rewound from step {rewind.from_step} to {rewind.to_step}, past "
            f"{counted(rewind.next_row - rewind.first_row, 'row')} from row "
            f"{rewind.first_row:,} on",
        )
        for rewind in run.rewinds
    ]
    found += [
        ("bad", f"Stood still at step {stall.get('step', '?')}: {stall.get('verdict', '')}")
        for stall in run.stalls
    ]
    if run.lost_rows:
        members = Counter(str(row.get("member", "?")) for row in run.lost_rows)
        worst, count = members.most_common(1)[0]
        found.append(
            ("warn", f"{counted(len(run.lost_rows), 'row')} in quarantine, {count} from {worst}")
        )
    found += [_end_event(life) for life in run.lives[:-1]]
    if run.lives and run.lives[-1].ended_s is not None and run.state != FINISHED:
        found.append(_end_event(run.lives[-1]))
    if run.discarded.series.get("loss/nats"):
        steps = len(run.discarded.series["loss/nats"])
        found.append(("note", f"{counted(steps, 'step')} taken again (metrics.discarded.jsonl)"))
    return found


def _end_event(life: Life) -> tuple[str, str]:
    if life.ended_s is None:
        return "warn", f"Life {life.number}, from step {life.first_step} on, left no end: killed"
    grade = "note" if is_orderly(life.reason) else "bad"
    return grade, f"Life {life.number} ended at step {life.last_step}: {end_of(life)}"
