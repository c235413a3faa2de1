"""What `pretrain doctor` may be asked."""

import pytest

from pretrain.compose import load
from pretrain.errors import ConfigError
from pretrain.preflight.config import Scope


def test_the_launchers_folder_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRETRAIN_PREFLIGHT_DIR", raising=False)
    options = load("doctor", []).doctor
    assert (options.scope, options.folder) == (Scope.machine, None)
    monkeypatch.setenv("PRETRAIN_PREFLIGHT_DIR", "/shared/preflight-0")
    assert load("doctor", ["doctor.scope=node"]).doctor.folder == "/shared/preflight-0"
    assert load("doctor", ["doctor.folder=elsewhere"]).doctor.folder == "elsewhere"


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
