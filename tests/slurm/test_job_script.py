"""What launch/job.sh decides, on a real SLURM, with small programs in place of the training."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pretrain.errors import ConfigError, DataError
from pretrain.loop.exit_record import note_exit
from pretrain.preflight.findings import Finding, Status
from pretrain.preflight.report import Measurements, NodeReport

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

ONE_NODE = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1")
TWO_NODES = ("--nodes=2", *ONE_NODE[1:])
FINISHED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

# Each is run as `PROGRAM -m pretrain COMMAND OVERRIDES...`.
SAVES_STEP_7 = """
cat > "$PRETRAIN_REQUEUE_RECORD" <<END
{"job_id": "$SLURM_JOB_ID", "restart_count": ${SLURM_RESTART_COUNT:-0}, "step": 7}
END
exit 75
"""
SAVES_A_LATER_STEP = SAVES_STEP_7.replace('"step": 7', '"step": ${SLURM_RESTART_COUNT:-0}')
CRASHES_WITH_A_CHECKPOINT_MORE = """
mkdir -p "$FOLDER/checkpoints"
echo "$FOLDER" > "$PRETRAIN_RUN_RECORD"
life=${SLURM_RESTART_COUNT:-0}
[ "$life" -ge 2 ] && exit 0
echo "step-000000000$((life + 8))" > "$FOLDER/checkpoints/latest"
kill -9 $$
"""
CRASHES_AT_ONCE = "exit 1\n"
MAKES_A_MISTAKE = """
# rank 0 waits for a rank that has left with the reason
[ "$SLURM_PROCID" = 0 ] && exec sleep 600
echo '{"code": 64, "error": "ConfigError", "is_final": true}' > "$PRETRAIN_EXIT_FOLDER/1.json"
exit 64
"""
WAS_ASKED_TO_STOP = """
echo '{"code": 75, "error": "", "is_final": false}' > "$PRETRAIN_EXIT_FOLDER/$SLURM_PROCID.json"
exit 75
"""
TWO_BAD_NODES = """
if [ "$3 $4" = "doctor doctor.scope=compare" ]; then
    # node2 is slow, as only the others can tell
    file=$PRETRAIN_PREFLIGHT_DIR/node2.json
    [ ! -f "$file" ] || sed -i s/true/false/ "$file"
    exit 1
fi
if [ "$3" = doctor ]; then
    echo "$4 $5" > "$FOLDER/asked-$SLURMD_NODENAME"
    [ "$SLURMD_NODENAME" = node1 ] && exit 1
    printf '{"node": "%s", "ok": true, "findings": []}\\n' "$SLURMD_NODENAME" \\
        > "$PRETRAIN_PREFLIGHT_DIR/$SLURMD_NODENAME.json"
    exit 0
fi
echo "trains on $SLURMD_NODENAME: $3 $4"
"""
A_NODE_IS_ALWAYS_BAD = """
[ "$SLURM_NODEID" = 0 ] && is_ok=false || is_ok=true
[ "$4" = doctor.scope=compare ] || printf '{"node": "%s", "ok": %s}\\n' "$SLURMD_NODENAME" $is_ok \\
    > "$PRETRAIN_PREFLIGHT_DIR/$SLURMD_NODENAME.json"
"""
EVERY_NODE_HANGS = "exec sleep 600\n"
EVERY_NODE_IS_BAD = """
[ "$4" = doctor.scope=compare ] && exit 1
cp "$FOLDER/bad.json" "$PRETRAIN_PREFLIGHT_DIR/$SLURMD_NODENAME.json"
exit 65
"""
BAD_NODE = NodeReport(
    node="bad",
    findings=[
        Finding(Status.ok, "python", "3.13"),
        Finding(Status.missing, "shards", 'none in "out/data", nor below', "build", DataError),
        Finding(Status.missing, "disk", "1 GiB free", "make room"),
    ],
    measurements=Measurements(),
)
FAILS_ITS_PROBE = """
# the words before are those that start the module
case "$*" in *doctor.scope=job*) echo "rank 1 trains wrong"; exit 64 ;; esac
echo "has trained"
"""
SHOWS_ITS_WORDS = """
for word in "$@"; do printf '[%s]' "$word"; done
echo "inside: $INSIDE"
"""
# pyxis begins in the folder that the image names
CONTAINER = "container=(--export=ALL,INSIDE=true env --chdir=/ 'INSIDE=a box; $HOME')\n"


@dataclass
class Case:
    """A job and how it is submitted."""

    program: str
    options: tuple[str, ...] = ONE_NODE
    arguments: tuple[str, ...] = ()
    environment: tuple[str, ...] = ("PRETRAIN_PREFLIGHT=0",)


CASES = {
    "standstill": Case(SAVES_STEP_7),
    "requeues": Case(
        SAVES_A_LATER_STEP, environment=("PRETRAIN_PREFLIGHT=0", "PRETRAIN_MAX_REQUEUES=1")
    ),
    "crashes": Case(CRASHES_WITH_A_CHECKPOINT_MORE),
    "crash-loop": Case(CRASHES_AT_ONCE),
    "no-requeue": Case(SAVES_STEP_7, options=(*ONE_NODE, "--no-requeue")),
    "mistake": Case(MAKES_A_MISTAKE, options=TWO_NODES),
    "stop": Case(WAS_ASKED_TO_STOP, options=TWO_NODES),
    "bad-nodes": Case(TWO_BAD_NODES, TWO_NODES, ("run.name=first",), ()),
    "bad-cluster": Case(A_NODE_IS_ALWAYS_BAD, TWO_NODES, environment=("PRETRAIN_MAX_RESUBMITS=1",)),
    "bad-job": Case(EVERY_NODE_IS_BAD, TWO_NODES, environment=()),
    "bad-probe": Case(
        FAILS_ITS_PROBE, TWO_NODES, environment=("PRETRAIN_PREFLIGHT=0", "PRETRAIN_PROBE=1")
    ),
    "bad-preflight": Case(CRASHES_AT_ONCE, environment=()),
    "hanging-preflight": Case(
        EVERY_NODE_HANGS, TWO_NODES, environment=("PRETRAIN_CHECK_MINUTES=1",)
    ),
    "container": Case(SHOWS_ITS_WORDS, arguments=("run.name=two words", "a='$(id);*'")),
    "inside-another": Case(
        SAVES_A_LATER_STEP,
        environment=(
            "PRETRAIN_PREFLIGHT=0",
            "PRETRAIN_MAX_REQUEUES=1",
            "SLURM_RESTART_COUNT=5",
            "SLURM_STEP_ID=0",
            "SLURM_CPU_BIND=corescores",
        ),
    ),
}


@dataclass
class Ended:
    """How a job ended, and everything it said."""

    job: dict[str, str]
    log: str
    folder: Path

    @property
    def code_and_restarts(self) -> tuple[str, str]:
        return self.job["ExitCode"], self.job["Restarts"]


@pytest.fixture(scope="module")
def ended(slurm, project, submit, tmp_path_factory) -> Callable[[str], Ended]:
    """All cases side by side: the wait of a job that queues again is SLURM's, not ours."""
    jobs: dict[str, Any] = {}
    for name, case in CASES.items():
        folder = tmp_path_factory.mktemp(name)
        program = folder / "program"
        program.write_text(f"#!/bin/sh\nFOLDER='{folder}'\n{case.program}")
        program.chmod(0o755)
        exported = [f"PRETRAIN_PYTHON={program}", *case.environment]
        if name == "bad-job":
            BAD_NODE.write(folder)
        if name == "container":
            (folder / "container.sh").write_text(CONTAINER)
            exported.append(f"PRETRAIN_CONTAINER={folder / 'container.sh'}")
        options = (*case.options, f"--job-name={name}", f"--export=ALL,{','.join(exported)}")
        kept = os.environ.pop("PRETRAIN_PREFLIGHT", None)
        jobs[name] = (submit(*options, "slurm/train.sbatch", *case.arguments), folder)
        if kept is not None:
            os.environ["PRETRAIN_PREFLIGHT"] = kept

    def wait(name: str) -> Ended:
        job_id, folder = jobs[name]
        # SLURM looks for steps that are over their time twice a minute
        job = slurm.wait(job_id, *FINISHED, timeout_s=180)
        return Ended(job, project.log(job_id), folder)

    return wait


def test_two_lives_in_a_row_without_progress_end_the_job(ended):
    standstill = ended("standstill")
    assert standstill.code_and_restarts == ("75:0", "2")
    assert standstill.log.count("saved step 7 on a signal; queues again at step 7") == 2
    assert "no progress in 2 lives in a row, the last checkpoint is step 7" in standstill.log


def test_a_crash_after_progress_is_gone_over(ended):
    crashes = ended("crashes")
    assert crashes.code_and_restarts == ("0:0", "2"), crashes.log
    assert "the ranks crashed (srun says 137); queues again at step 8" in crashes.log
    assert "queues again at step 9" in crashes.log


def test_a_crash_loop_ends(ended):
    loop = ended("crash-loop")
    assert loop.code_and_restarts == ("1:0", "1"), loop.log
    assert "no progress in 2 lives in a row, the last checkpoint is step none" in loop.log


def test_a_job_that_may_not_queue_again_says_so(ended):
    job = ended("no-requeue")
    assert job.code_and_restarts == ("1:0", "0"), job.log
    assert "SLURM does not queue the job again" in job.log
    assert "--requeue" in job.log


def test_a_job_restarts_so_often_and_no_oftener(ended):
    job = ended("requeues")
    assert job.code_and_restarts == ("75:0", "1"), job.log
    assert "restarted 1 times, which is enough (PRETRAIN_MAX_REQUEUES=1)" in job.log


def test_a_job_submitted_from_inside_another_goes_by_its_own_numbers(ended):
    """What the shell of another job's step hands on, as SLURM 22.05 does."""
    job = ended("inside-another")
    assert job.code_and_restarts == ("75:0", "1"), job.log
    assert "restart 0: saved step 0 on a signal; queues again" in job.log


def test_the_code_of_a_mistake_survives_the_killing_of_the_others(ended):
    job = ended("mistake")
    assert job.code_and_restarts == ("64:0", "0"), job.log
    assert "rank 1 ended with ConfigError, which another life would repeat" in job.log


def test_a_job_that_was_asked_to_stop_does_not_come_back(ended):
    job = ended("stop")
    assert job.code_and_restarts == ("75:0", "0"), job.log
    assert "was asked to stop (control/stop in the run folder)" in job.log


def test_nodes_that_fail_the_preflight_are_named_and_left_out(ended):
    job = ended("bad-nodes")
    assert job.code_and_restarts == ("0:0", "1"), job.log
    assert job.job["ExcNodeList"] in ("node[1-2]", "node1,node2")
    assert "node1 left no result of the preflight" in job.log
    assert "the comparison of the nodes finds something" in job.log
    assert "node2 fails the preflight, see " in job.log
    assert "queues again without node1,node2" in job.log
    for node in ("node3", "node4"):
        assert f"trains on {node}: train run.name=first" in job.log
        asked = (job.folder / f"asked-{node}").read_text()
        assert asked == "doctor.scope=node run.name=first\n"
    assert "trains on node1" not in job.log


def test_what_every_node_lacks_is_the_job_s_fault_and_named_once(ended):
    job = ended("bad-job")
    assert job.code_and_restarts == ("65:0", "0"), job.log
    said = job.log.partition("so the fault is the job's and none is left out:")[2].splitlines()
    assert said[1:3] == [
        "    disk: 1 GiB free",
        r"    shards: none in \"out/data\", nor below",
    ], job.log
    assert job.job["ExcNodeList"] in ("", "(null)")


def test_leaving_nodes_out_has_an_end(ended):
    job = ended("bad-cluster")
    assert job.code_and_restarts == ("1:0", "1"), job.log
    assert "PRETRAIN_MAX_RESUBMITS=1" in job.log


def test_ranks_that_fail_their_probe_do_not_train(ended) -> None:
    job = ended("bad-probe")
    assert job.code_and_restarts == ("64:0", "0"), job.log
    assert "the ranks fail their probe" in job.log
    assert "rank 1 trains wrong" in job.log
    assert "has trained" not in job.log


def test_a_preflight_that_cannot_run_blames_no_node(ended):
    job = ended("bad-preflight")
    assert job.code_and_restarts == ("1:0", "0"), job.log
    assert "the preflight itself failed (code 1), not the nodes" in job.log


def test_a_preflight_that_hangs_everywhere_ends(ended):
    hanging = ended("hanging-preflight")
    assert hanging.job["JobState"] == "FAILED", hanging.log
    assert hanging.job["Restarts"] == "0"
    assert "no node left a result in " in hanging.log


def test_a_container_is_put_around_every_rank_and_words_stay_whole(ended):
    job = ended("container")
    assert job.code_and_restarts == ("0:0", "0"), job.log
    assert "[-m][pretrain][train][run.name=two words][a='$(id);*']" in job.log
    assert "inside: a box; $HOME" in job.log


def test_a_job_outside_the_project_says_where_to_submit(slurm, project, submit, tmp_path):
    (tmp_path / "slurm/logs").mkdir(parents=True)
    script = project.folder / "slurm/train.sbatch"
    job_id = slurm.submit(*ONE_NODE, str(script), cwd=tmp_path)
    assert slurm.wait(job_id, *FINISHED)["ExitCode"] == "64:0"
    (log,) = (tmp_path / "slurm/logs").glob("*.log")
    assert "submit from the project's root" in log.read_text()


def test_records_are_what_the_program_writes(tmp_path, monkeypatch):
    """The small programs above leave what the real one leaves, letter by letter."""
    monkeypatch.setenv("PRETRAIN_EXIT_FOLDER", str(tmp_path))
    monkeypatch.setenv("SLURM_PROCID", "1")
    note_exit(64, ConfigError("no"), is_final=True)
    assert (tmp_path / "1.json").read_text() in MAKES_A_MISTAKE.replace("'", "\n")
    note_exit(75)
    assert json.loads((tmp_path / "1.json").read_text())["code"] == 75
    assert (tmp_path / "1.json").read_text() in WAS_ASKED_TO_STOP.replace("'", "\n")
