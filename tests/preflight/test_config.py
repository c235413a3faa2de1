"""What `pretrain doctor` may be asked."""

from pathlib import Path

import pytest

from pretrain.compose import load, write_frozen
from pretrain.errors import ConfigError
from pretrain.preflight.config import Scope


def test_the_launchers_folder_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRETRAIN_PREFLIGHT_DIR", raising=False)
    options = load("doctor", []).doctor
    assert (options.scope, options.folder) == (Scope.machine, None)
    monkeypatch.setenv("PRETRAIN_PREFLIGHT_DIR", "/shared/preflight-0")
    assert load("doctor", ["doctor.scope=node"]).doctor.folder == "/shared/preflight-0"
    assert load("doctor", ["doctor.folder=elsewhere"]).doctor.folder == "elsewhere"


def test_a_run_that_exists_is_looked_at_as_it_was_frozen(tmp_path: Path) -> None:
    write_frozen(load("train", ["run.seed=7"]), tmp_path)
    overrides = [f"run.dir={tmp_path}", "doctor.scope=node", f"doctor.folder={tmp_path}/reports"]
    config = load("doctor", overrides, resumes=True)
    assert config.run.seed == 7
    assert config.doctor.scope is Scope.node
    assert config.doctor.folder == f"{tmp_path}/reports"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("doctor.burn_s=0", "doctor.burn_s=0 must be above 0"),
        ("doctor.stale_lock_s=-1", "doctor.stale_lock_s=-1 must be above 0"),
        ("doctor.shards=0", "doctor.shards=0 must be at least 1"),
        ("doctor.scope=cluster", "cluster"),
        ("doctor.scope=compare", "doctor.folder=FOLDER"),
    ],
)
def test_what_cannot_be_is_refused(
    override: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PRETRAIN_PREFLIGHT_DIR", raising=False)
    with pytest.raises(ConfigError, match=said):
        load("doctor", [override])
