"""A node of a job: what it finds, and the file that it leaves."""

import json
import os
import shutil
from pathlib import Path

import pytest

from conftest import SMALL, run_cli
from pretrain.compose import load
from pretrain.data.config import OnDamage
from pretrain.data.shards import Layout
from pretrain.data.store import open_manifest
from pretrain.engine.config import Device
from pretrain.preflight.findings import Finding, Status
from pretrain.preflight.node import (
    _survive,
    check_count,
    check_first_members,
    check_speed,
    check_versions,
    judge_rates,
)
from pretrain.preflight.report import Measurements, read_report


def shards_of(workspace: Path) -> str:
    # other tests may have built more beside them
    return str(workspace / load("train", SMALL).data.shards)


@pytest.fixture
def config(workspace: Path):
    return load("doctor", [*SMALL, f"data.shards={shards_of(workspace)}", "doctor.burn_s=0.1"])


def node(cwd: Path, folder: Path, *overrides: str, **environ: str):
    """As the launcher starts it: inside a job step of two nodes, which it must not wait for."""
    step = {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
            "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n0,n1", "SLURM_NODEID": "1",
            "SLURMD_NODENAME": "n1", "PRETRAIN_PREFLIGHT_DIR": str(folder)}  # fmt: skip
    command = ("doctor", "doctor.scope=node", "doctor.burn_s=0.1", *SMALL, *overrides)
    return run_cli(cwd, *command, **(step | environ))


def test_a_healthy_node_says_so_in_its_file_and_meets_no_other(workspace, tmp_path) -> None:
    done = node(workspace, tmp_path, "engine.device=cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Node n1 can train" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["n1.json"]
    content = json.loads((tmp_path / "n1.json").read_text())
    assert (content["node"], content["ok"]) == ("n1", True)
    measured = read_report(tmp_path / "n1.json").measurements
    assert measured.devices == ["cpu"]
    assert measured.rates["gemm_tflops"][0] > 0
    assert measured.rates["host_copy_gb_per_s"][0] > 0
    assert measured.clock is not None
    assert abs(measured.clock.offset_s) < 1
    assert measured.versions["torch"].startswith("2.")
    assert {"code", "config", "tokenizer", "shards"} == set(measured.hashes)
    assert "none" not in measured.hashes.values()
    subjects = {found["subject"] for found in content["findings"]}
    assert {
        "driver",
        "disk",
        "shared memory",
        "open files",
        "compile lock",
        "trial step",
    } <= subjects


def test_a_node_without_the_gpus_of_the_run_is_refused_by_name(workspace, tmp_path) -> None:
    done = node(workspace, tmp_path, "engine.device=cuda", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 64
    assert "keep node n1 from training" in done.stderr
    content = json.loads((tmp_path / "n1.json").read_text())
    assert content["ok"] is False
    missing = {f["subject"] for f in content["findings"] if f["status"] == "missing"}
    assert "gpu" in missing


def test_gpus_are_counted_against_the_cluster(config) -> None:
    config.cluster.gpus_per_node = 8
    config.engine.device = Device.cuda

    def status(visible: int, present: int = 8) -> Status:
        (finding,) = check_count(config, visible=visible, present=present)
        assert (finding.status is Status.ok) == (finding.remedy == "")
        return finding.status

    assert [status(8), status(7), status(0)] == [Status.ok, Status.missing, Status.missing]
    # torch without CUDA would train on the CPU of a node that has GPUs
    config.engine.device = Device.auto
    assert [status(0), status(0, present=0)] == [Status.missing, Status.ok]
    config.engine.device = Device.cpu
    assert status(0) is Status.ok


def test_a_damaged_first_member_is_found_on_the_node_that_reads_it(
    config, workspace, tmp_path, monkeypatch
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(shards_of(workspace), shards)
    config.data.shards = str(shards)
    config.doctor.shards = 1
    manifest = open_manifest(config.data)
    entries = [shard for source in manifest.sources for shard in source.train]
    place = Layout.of(manifest, entries[1]).tokens_member(0)[0] + 200
    with (shards / entries[1].name).open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))

    def statuses(node_id: int, shards: int = 1) -> list[Status]:
        monkeypatch.setenv("SLURM_NODEID", str(node_id))
        config.doctor.shards = shards
        return [finding.status for finding in check_first_members(config, Measurements())]

    assert statuses(0) == [Status.ok]
    assert statuses(1) == [Status.missing]
    assert statuses(0, shards=2) == [Status.missing, Status.ok]
    # round and round
    assert statuses(1 + len(entries)) == [Status.missing]
    config.data.on_damage = OnDamage.quarantine
    assert statuses(1) == [Status.warn]


def test_a_slow_device_is_named_among_its_neighbours() -> None:
    found = [*judge_rates({"gemm_tflops": [700.0, 698.0, 520.0, 701.0], "copy": [50.0, 50.0]})]
    assert [finding.status for finding in found] == [Status.missing, Status.ok]
    assert "device 2 is slower" in found[0].detail


def test_a_wrong_product_keeps_the_node_out(config, monkeypatch) -> None:
    import torch

    multiply = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, out: multiply(*a, out=out).neg_())
    found = [*check_speed(config, Measurements())]
    assert found[0].status is Status.missing
    assert "computes wrong" in found[0].detail


def test_a_burn_lasts_as_long_as_it_is_told(config, monkeypatch) -> None:
    asked = []
    from pretrain.preflight import node as module

    real = module.burn
    monkeypatch.setattr(
        module,
        "burn",
        lambda devices, seconds, midway: asked.append(seconds) or real(devices, 0.01),
    )
    for seconds in (0.5, 7.0):
        config.doctor.burn_s = seconds
        list(check_speed(config, Measurements()))
    assert asked == [0.5, 7.0]


def test_hashes_follow_the_configuration_and_not_the_doctors_own(config) -> None:
    def hashes() -> dict[str, str]:
        measured = Measurements()
        list(check_versions(config, measured))
        return measured.hashes

    before = hashes()
    config.doctor.burn_s = 9.0
    assert hashes() == before
    config.run.seed += 1
    changed = {name for name, value in hashes().items() if value != before[name]}
    assert changed == {"config"}


def test_a_check_that_breaks_is_a_finding(config) -> None:
    def check_bus(config, measured):
        yield Finding(Status.ok, "bus", "there")
        raise RuntimeError("fallen off")

    first, second = _survive(check_bus, config, Measurements())
    assert first.status is Status.ok
    assert second.status is Status.missing
    assert second.subject == "bus"
    assert "RuntimeError: fallen off" in second.detail


def test_a_node_has_the_name_that_slurm_gave_it(monkeypatch) -> None:
    from pretrain.preflight.node import node_name

    monkeypatch.setenv("SLURMD_NODENAME", "n07")
    assert node_name() == "n07"
    monkeypatch.delenv("SLURMD_NODENAME")
    assert node_name() == os.uname().nodename
