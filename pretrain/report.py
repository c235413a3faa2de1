"""The command `pretrain report`: a run, alone or beside others, as one HTML file."""

from pathlib import Path

from pretrain.config import ReportConfig
from pretrain.errors import ConfigError
from pretrain.reporting.page import render
from pretrain.reporting.run import read_run, told_apart


def main(config: ReportConfig) -> None:
    """Write the page and say where it is.

    Raises CheckpointError if a folder is no run, or states are asked for and it has no checkpoint;
    ConfigError if the file cannot be written.
    """
    options, folder = config.report, Path(config.run.dir)
    path = Path(options.to) if options.to is not None else folder / "report.html"
    if path.is_dir():
        raise ConfigError(
            f"report.to={path} is a folder; name a file in it: report.to={path / 'report.html'}"
        )
    runs = told_apart([read_run(path) for path in (folder, *map(Path, options.compare))])
    states: list[str] = []
    if options.states:
        # the one part that needs torch
        from pretrain.reporting.states import state_figures

        states = state_figures(folder, options.prompt, iterations=options.iterations)
    text = render(runs, states=states)
    _write(path, text)
    print(f"written: {path} ({len(text.encode()) / 1024:,.0f} KiB)")


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    draft = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_text(text, encoding="utf-8")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}. Name another file: report.to=FILE.html."
        ) from error
