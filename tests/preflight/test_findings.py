"""Findings are printed with their remedies, without secrets, and refuse what cannot train."""

import pytest

from pretrain.errors import ConfigError, DataError
from pretrain.preflight.findings import Finding, Status, refuse_missing, show

OK = Finding(Status.ok, "disk", "there")
DATA = Finding(Status.missing, "shards", "gone", "build them", DataError)
MACHINE = Finding(Status.missing, "gpu", "none")


def test_findings_are_shown_as_they_come(capsys: pytest.CaptureFixture[str]) -> None:
    def findings():
        yield DATA
        assert "gone" in capsys.readouterr().out
        yield OK

    assert show(findings()) == [DATA, OK]
    assert capsys.readouterr().out == "ok      disk          there\n"


def test_no_secret_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORE_TOKEN", "a-secret-of-forty")
    show([Finding(Status.warn, "shards", "a-secret-of-forty", "ask a-secret-of-forty")])
    assert "a-secret" not in capsys.readouterr().out


def test_what_is_wrong_with_the_machine_comes_before_the_data() -> None:
    refuse_missing([OK], "this machine", "tiny")
    with pytest.raises(DataError, match="1 of 2 findings keep n1 from training tiny: shards"):
        refuse_missing([OK, DATA], "n1", "tiny")
    with pytest.raises(
        ConfigError, match="2 of 2 findings keep n1 from training tiny: shards, gpu"
    ):
        refuse_missing([DATA, MACHINE], "n1", "tiny")
