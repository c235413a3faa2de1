"""`make bench` ends when it is told to, refuses at once what it cannot do, and loses no row."""

import threading
from pathlib import Path

import pytest

from pretrain.testing import load_module

BENCHMARKS = Path(__file__).parent.parent / "kernels/benchmarks"


class TestLoader:
    @pytest.fixture
    def loader(self, monkeypatch):
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        return load_module(BENCHMARKS / "loader.py")

    def test_no_server_outlives_an_interruption(self, loader, tmp_path):
        before = set(threading.enumerate())
        with pytest.raises(KeyboardInterrupt), loader.served(tmp_path):
            raise KeyboardInterrupt
        assert set(threading.enumerate()) == before
