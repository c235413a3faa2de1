"""`pretrain sweep collect sweep.dir=...`: the runs of a sweep, the best held-out loss first."""

import csv
import math
from pathlib import Path

from pretrain.config import SweepConfig
from pretrain.jobs.sweeps import COLUMNS, PointReport, cells, print_table, read_sweep, report


def main(config: SweepConfig) -> None:
    """Print the table and write it as sweep.csv beside sweep.json.

    Runs without a validation come last. Raises ConfigError if the folder holds no sweep.
    """
    folder = Path(config.sweep.dir)
    lines = sorted(report(read_sweep(folder)), key=_held_out)
    path = folder / "sweep.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*lines[0].point.swept, *COLUMNS])
        writer.writerows(cells(line) for line in lines)
    print_table(f"{folder}, by held-out loss at the mean depth", lines)
    print(f"written: {path}")


def _held_out(line: PointReport) -> float:
    loss = None if line.progress is None else line.progress.held_out_nats
    return math.inf if loss is None or math.isnan(loss) else loss
