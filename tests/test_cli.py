"""Hydra's flags check what they show, and leave nothing behind."""

from pathlib import Path

import pytest

from conftest import run_cli


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cfg", "job", "+model.typo=1"], "Nothing reads this key"),
        (["--cfg", "job", "hydra.typo=1"], "hydra.typo"),
        (["--info", "defaults", "model.typo=1"], "typo"),
        (["--config-dir", ".", "+model.typo=1"], "Nothing reads this key"),
        (["--config-dir", ".", "batch.micro_rows=3"], "batch.micro_rows=3"),
        (["--typo"], "unrecognized arguments: --typo"),
        (["-m", "--cfg", "job", "run.seed=1,2"], "--cfg cannot go with --multirun"),
    ],
    ids=str,
)
def test_mistakes_beside_flags_are_refused(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = run_cli(tmp_path, "plan", *arguments)
    assert said in done.stderr
    assert done.returncode == 64
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_another_folder_of_options_is_read(tmp_path: Path) -> None:
    (tmp_path / "conf" / "batch").mkdir(parents=True)
    (tmp_path / "conf" / "batch" / "mine.yaml").write_text("global_tokens: 65536\nmicro_rows: 1\n")
    done = run_cli(tmp_path, "plan", "--config-dir", "conf", "batch=mine")
    assert done.returncode == 0, done.stderr
    assert "65,536" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["conf"]
