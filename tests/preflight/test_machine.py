"""One machine: versions, memory, disk, batch and tracking."""

import dataclasses
import os
import tempfile

import pytest
from packaging.requirements import Requirement

from pretrain.compose import load
from pretrain.engine.config import Device
from pretrain.loop.beginning import check_can_begin
from pretrain.loop.config import WandbMode
from pretrain.model.config import ComputePath
from pretrain.preflight.findings import Status
from pretrain.preflight.machine import (
    check_batch,
    check_machine,
    check_packages,
    check_python,
    check_run_folder,
    check_tracking,
    check_triton,
    compare_package,
)


@pytest.fixture
def config(tmp_path):
    return load("train", [f"run.dir={tmp_path}/run", f"data.shards={tmp_path}/shards"])


def test_this_python_and_its_packages_are_within_the_declared_bounds(config):
    findings = [*check_python(config), *check_packages(config)]
    assert {"python", "torch", "deepspeed", "hydra-core"} <= {f.subject for f in findings}
    assert [f for f in findings if f.status is not Status.ok] == []


def test_package_that_is_absent_or_too_old_is_missing_with_the_command_to_install_it():
    absent = compare_package(Requirement("no-such-package-here>=1"))
    assert absent.status is Status.missing
    assert "not installed" in absent.detail
    old = compare_package(Requirement("numpy>=99"))
    assert old.status is Status.missing
    assert old.remedy == "pip install 'numpy>=99'"
    assert compare_package(Requirement("numpy>=2")).status is Status.ok


def test_run_folder_that_cannot_be_written_is_missing(config, tmp_path):
    blocked = dataclasses.replace(config.run, dir="/proc/run")
    (finding,) = check_run_folder(dataclasses.replace(config, run=blocked))
    assert finding.status is Status.missing
    assert "run.dir" in finding.remedy


def test_run_folder_that_training_would_refuse_is_missing(config, tmp_path):
    (tmp_path / "thesis.txt").touch()
    theirs = dataclasses.replace(config.run, dir=str(tmp_path))
    (finding,) = check_run_folder(dataclasses.replace(config, run=theirs))
    assert finding.status is Status.missing
    assert "it holds thesis.txt. Choose another run.dir" in finding.detail


def test_nodes_that_try_one_run_folder_at_once_see_nothing_of_each_other(
    config, tmp_path, monkeypatch
):
    """On file systems whose files have a name for a moment before they are anonymous."""
    shared = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(tmp_path)))
    unlink, looks = os.unlink, []

    def look_before_unlinking(path, **options):
        looks.append(os.listdir(tmp_path))
        check_can_begin(shared)
        unlink(path, **options)

    monkeypatch.setattr(tempfile, "_O_TMPFILE_WORKS", False)
    monkeypatch.setattr(os, "unlink", look_before_unlinking)
    findings = list(check_run_folder(shared))
    assert [len(names) for names in looks] == [1]
    assert [finding.status for finding in findings] == [Status.ok, Status.ok]


def test_disk_that_cannot_hold_a_checkpoint_is_missing(config):
    """A model of 10^13 parameters needs 120 TB for one checkpoint."""
    here = [finding.status for finding in check_run_folder(config)]
    assert here == [Status.ok, Status.ok]
    model = dataclasses.replace(config.model, inner=10**10)
    folder, disk = check_run_folder(dataclasses.replace(config, model=model))
    assert folder.status is Status.ok
    assert disk.status is Status.missing
    assert "checkpoint.keep_last" in disk.remedy


def test_model_that_does_not_fit_is_a_warning_with_what_to_change(config):
    model = dataclasses.replace(config.model, inner=10**10)
    found = [*check_machine(dataclasses.replace(config, model=model))]
    (memory,) = [finding for finding in found if finding.subject == "memory"]
    assert memory.status is Status.warn
    assert "engine.checkpoint_activations" in memory.remedy


def test_a_fused_path_without_a_gpu_is_said_to_run_on_references(config):
    cpu = dataclasses.replace(config, engine=dataclasses.replace(config.engine, device=Device.cpu))
    (plain,) = check_triton(cpu)
    fused = dataclasses.replace(cpu.model, path=ComputePath.fused)
    (finding,) = check_triton(dataclasses.replace(cpu, model=fused))
    assert finding.status is plain.status is Status.ok
    told = "; model.path=fused runs the kernels' PyTorch references here"
    assert finding.detail == f"{plain.detail}{told}"


def test_batch_is_checked_against_this_hosts_ranks(config):
    (finding,) = check_batch(config)
    assert finding.status is Status.ok
    uneven = dataclasses.replace(config.batch, micro_rows=3)
    (finding,) = check_batch(dataclasses.replace(config, batch=uneven))
    assert finding.status is Status.warn
    assert "micro_rows=3" in finding.detail


def test_tracking_never_blocks_and_says_where_records_go(config, monkeypatch, tmp_path):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    details = {}
    for mode in WandbMode:
        logging = dataclasses.replace(config.logging, wandb=mode)
        (finding,) = check_tracking(dataclasses.replace(config, logging=logging))
        assert finding.status is Status.ok
        details[mode] = finding.detail
    assert details[WandbMode.auto].startswith("offline")
    assert "WANDB_API_KEY" in details[WandbMode.auto]
    assert details[WandbMode.disabled].startswith("disabled")
