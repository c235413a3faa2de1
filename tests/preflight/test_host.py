"""Shared memory, limits, compile caches and clocks of a node."""

import os
import resource
import time
from pathlib import Path

import pytest

from pretrain.compose import load
from pretrain.config import DoctorConfig
from pretrain.preflight import host
from pretrain.preflight.findings import Status
from pretrain.preflight.host import (
    check_caches,
    check_limits,
    check_shared_memory,
    read_clock,
)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DoctorConfig:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    loaded: DoctorConfig = load("doctor", ["doctor.stale_lock_s=600"])
    return loaded


def lock(tmp_path: Path, *, age_s: float) -> Path:
    path = tmp_path / "extensions/py311_cu130/fused_adam/lock"
    path.parent.mkdir(parents=True)
    path.touch()
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_a_lock_that_was_left_behind_is_named_with_the_command(config, tmp_path) -> None:
    path = lock(tmp_path, age_s=1200)
    (finding,) = check_caches(config)
    assert finding.status is Status.warn
    assert "20 minutes old" in finding.detail
    assert finding.remedy.startswith(f"rm {path}")


def test_a_lock_of_a_compiler_at_work_is_left_alone(config, tmp_path) -> None:
    lock(tmp_path, age_s=60)
    (finding,) = check_caches(config)
    assert finding.status is Status.ok
    config.doctor.stale_lock_s = 30
    (finding,) = check_caches(config)
    assert finding.status is Status.warn


def test_a_cache_that_cannot_be_written_is_named_by_its_variable(config, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/proc/triton")
    cache, locks = check_caches(config)
    assert cache.status is Status.missing
    assert "/proc/triton" in cache.detail
    assert "TRITON_CACHE_DIR" in cache.remedy
    assert locks.status is Status.ok


def test_looking_at_caches_leaves_nothing(config, tmp_path) -> None:
    list(check_caches(config))
    assert not list(tmp_path.iterdir())


def test_few_open_files_are_missing(config) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (900, before[1]))
        found = [*check_limits(config)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert found[0].status is Status.missing
    assert "900 open files" in found[0].detail
    assert "ulimit -n 1024" in found[0].remedy


def test_infiniband_needs_locked_memory(config, tmp_path, monkeypatch) -> None:
    cards = tmp_path / "infiniband"
    (cards / "mlx5_0").mkdir(parents=True)
    monkeypatch.setattr(host, "INFINIBAND", cards)
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (64 << 10, before[1]))
        _, locked = check_limits(config)
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, before)
    assert locked.status is Status.warn
    assert "ulimit -l unlimited" in locked.remedy
    monkeypatch.setattr(host, "INFINIBAND", tmp_path / "none")
    assert len([*check_limits(config)]) == 1


def test_shared_memory_is_measured_against_the_ranks_of_a_node(config) -> None:
    (finding,) = check_shared_memory(config)
    assert "1 ranks may take 0.25" in finding.detail
    config.cluster.gpus_per_node = 10**6
    (finding,) = check_shared_memory(config)
    assert finding.status is Status.warn


def test_a_clock_that_is_wrong_is_measured(tmp_path, monkeypatch) -> None:
    right = read_clock(tmp_path)
    assert abs(right.offset_s) <= right.resolution_s
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 5)
    wrong = read_clock(tmp_path)
    assert abs(wrong.offset_s - 5) <= wrong.resolution_s
    assert not list(tmp_path.iterdir())
