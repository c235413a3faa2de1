"""The command `pretrain report`: a run, alone or beside others, as one HTML file."""

from pathlib import Path

from pretrain.config import ReportConfig
from pretrain.reporting.page import render
from pretrain.reporting.run import read_run


def main(config: ReportConfig) -> None:
    """Write the page and say where it is.

    Raises CheckpointError if a folder is no run, or states are asked for and it has no checkpoint.
    """
    options, folder = config.report, Path(config.run.dir)
    runs = [read_run(path) for path in (folder, *map(Path, options.compare))]
    states: list[str] = []
    if options.states:
        # the one part that needs torch
        from pretrain.reporting.states import state_figures

        states = state_figures(folder, options.prompt, iterations=options.iterations)
    path = Path(options.to) if options.to is not None else folder / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = render(runs, states=states)
    draft = path.with_name(path.name + ".partial")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
    print(f"written: {path} ({len(text.encode()) / 1024:,.0f} KiB)")
