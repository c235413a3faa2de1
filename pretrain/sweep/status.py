"""`pretrain sweep status sweep.dir=...`: what each run of a sweep is doing."""

from collections import Counter
from pathlib import Path

from pretrain.config import SweepConfig
from pretrain.jobs.sweeps import print_table, read_sweep, report


def main(config: SweepConfig) -> None:
    """Print a row for each run. Raises ConfigError if the folder holds no sweep."""
    lines = report(read_sweep(Path(config.sweep.dir)))
    counts = Counter(line.state.value for line in lines)
    said = ", ".join(f"{count} {state}" for state, count in counts.items())
    print_table(f"{config.sweep.dir}: {said}", lines)
