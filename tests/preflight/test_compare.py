"""Nodes side by side: who differs, who is slow, and what is written into whose file."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import run_cli
from pretrain.errors import DataError
from pretrain.preflight.compare import MARK, judge, read_reports
from pretrain.preflight.findings import Finding, Status
from pretrain.preflight.host import Clock
from pretrain.preflight.report import Measurements, NodeReport, read_report


def report(node: str, *, gemm=(700.0,), torch="2.13.0", code="aa", offset_s=0.0) -> NodeReport:
    return NodeReport(
        node=node,
        findings=[Finding(Status.ok, "driver", "580.1")],
        measurements=Measurements(
            versions={"torch": torch, "nccl": "2.27"},
            hashes={"code": code},
            devices=["H100"] * len(gemm),
            rates={"gemm_tflops": list(gemm)},
            clock=Clock(offset_s, 0.01),
        ),
    )


def compare(folder: Path, cwd: Path):
    return run_cli(cwd, "doctor", "doctor.scope=compare", f"doctor.folder={folder}")


def test_equal_nodes_have_no_verdict() -> None:
    reports = [report(f"n{i}", gemm=(700.0 + i, 690.0)) for i in range(4)]
    assert not any(judge(reports).values())


@pytest.mark.parametrize(
    ("change", "subject", "said"),
    [
        ({"torch": "2.11.0"}, "torch", "2.11.0, but 2.13.0 on 3 of 4"),
        ({"code": "bb"}, "code", "bb, but aa on 3 of 4"),
        ({"gemm": (500.0,)}, "gemm_tflops", "device 0: 500, 29 % below the median of the 3 others"),
        ({"gemm": (700.0, 700.0)}, "devices", "2 H100, but 1 H100 on 3 of 4"),
    ],
)
def test_the_node_that_differs_is_named_and_no_other(change, subject, said) -> None:
    verdicts = judge([report("n1", **change), *(report(f"n{i}") for i in (2, 3, 4))])
    (finding,) = verdicts.pop("n1")
    assert finding.status is Status.missing
    assert finding.subject == f"{MARK}: {subject}"
    assert said in finding.detail
    assert finding.remedy
    assert not any(verdicts.values())


def test_one_slow_gpu_among_many_is_named_by_its_number() -> None:
    slow = report("n2", gemm=(700.0, 702.0, 520.0, 699.0))
    verdicts = judge([report("n1", gemm=(700.0, 698.0, 701.0, 700.0)), slow])
    (finding,) = verdicts["n2"]
    assert "device 2: 520, 26 % below" in finding.detail
    assert not verdicts["n1"]


def test_a_slow_cpu_is_told_and_keeps_nobody_out() -> None:
    """It may be busy with something else."""
    reports = [report(f"n{i}", gemm=(0.1 if i else 0.02,)) for i in range(4)]
    for node in reports:
        node.measurements.devices = ["cpu"]
    (finding,) = judge(reports)["n0"]
    assert finding.status is Status.warn


def test_without_a_majority_the_first_counts() -> None:
    verdicts = judge([report("n1", code="bb"), report("n2", code="aa")])
    assert not verdicts["n1"]
    assert "aa, but bb on 1 of 2" in verdicts["n2"][0].detail


def test_what_a_node_did_not_tell_differs() -> None:
    silent = report("n3")
    del silent.measurements.versions["nccl"]
    (finding,) = judge([report("n1"), report("n2"), silent])["n3"]
    assert "none, but 2.27" in finding.detail


def test_a_wrong_clock_is_told_and_keeps_nobody_out() -> None:
    verdicts = judge([report("n1"), report("n2", offset_s=-7.0), report("n3", offset_s=0.5)])
    (finding,) = verdicts["n2"]
    assert finding.status is Status.warn
    assert "-7.00 s" in finding.detail
    assert not verdicts["n3"]


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    wrong = Finding(Status.missing, "shard", "damaged", "copy it", DataError)
    written = report("n1")
    written.findings.append(wrong)
    path = written.write(tmp_path)
    assert path == tmp_path / "n1.json"
    assert read_report(path) == written
    content = json.loads(path.read_text())
    assert (content["node"], content["ok"]) == ("n1", False)
    assert set(content) == {"node", "ok", "findings", "measurements"}
    assert list(tmp_path.iterdir()) == [path]


def test_a_report_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_TOKEN", "a-secret-of-forty")
    written = report("n1")
    written.findings.append(Finding(Status.missing, "shards", "no such a-secret-of-forty"))
    assert "a-secret" not in written.write(tmp_path).read_text()


def test_the_command_marks_the_files_of_bad_nodes_and_of_no_other(tmp_path: Path) -> None:
    folder = tmp_path / "preflight"
    for node in (report("n1"), report("n2", gemm=(400.0,)), report("n3"), report("n4")):
        node.write(folder)
    first = compare(folder, tmp_path)
    assert first.returncode == 64
    assert "keep n2 from training tiny: beside others: gemm_tflops." in first.stderr
    files = {path.stem: json.loads(path.read_text()) for path in folder.iterdir()}
    assert {node: file["ok"] for node, file in files.items()} == {
        "n1": True,
        "n2": False,
        "n3": True,
        "n4": True,
    }
    # again, without what is no longer so
    assert compare(folder, tmp_path).stdout == first.stdout
    assert len(read_report(folder / "n2.json").findings) == 2
    report("n2").write(folder)
    again = compare(folder, tmp_path)
    assert again.returncode == 0, again.stderr
    assert "4 nodes agree" in again.stdout


def test_a_damaged_report_is_a_bad_node_and_none_at_all_an_error(tmp_path: Path) -> None:
    report("n1").write(tmp_path)
    (tmp_path / "n2.json").write_text('{"node": "n2"')
    (bad,) = [found for found in read_reports(tmp_path) if not found.is_ok]
    assert bad.node == "n2"
    assert "is no report of a node" in bad.findings[0].detail
    shutil.rmtree(tmp_path)
    with pytest.raises(DataError, match=r"doctor\.scope=node"):
        read_reports(tmp_path)


def test_nodes_are_compared_without_torch() -> None:
    """Whose import takes seconds, on the one node that launches the job."""
    code = "import sys, pretrain.doctor, pretrain.preflight.compare; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
