"""Files in <run.dir>/control are wishes; tests/faults/test_requests.py has a run that obeys."""

import logging
from pathlib import Path

import pytest
import torch

from pretrain.engine.world import World
from pretrain.loop.control import Control, Requests

MAIN = World(0, 1, 0, torch.device("cpu"))


def test_what_is_asked_for_is_the_files_that_are_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    control = Control(tmp_path, MAIN)
    assert control.poll() == Requests()
    control.open()
    for name in ("save", "pause", "stopp"):
        (tmp_path / "control" / name).touch()
    with caplog.at_level(logging.WARNING):
        assert control.poll() == control.poll() == Requests(save=True, pause=True)
    assert caplog.text.count("stopp asks for nothing: it is none of stop, save, pause") == 1
    control.forget("save")
    assert control.poll() == Requests(pause=True) == control.last
    assert not control.is_stopped()
    assert Control(tmp_path, World(1, 1, 1, torch.device("cpu"))).poll() == Requests()
