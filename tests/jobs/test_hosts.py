"""A run on several hosts by ssh: the real launch, with a transport that leads back to this one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import SMALL
from pretrain.errors import EXIT_SAVED_ON_SIGNAL, ConfigError
from pretrain.jobs import hosts
from pretrain.jobs.hosts import Host, Part, check_hosts, read_hostfile, ssh_command
from pretrain.loop.metrics import read_metrics
from pretrain.testing import free_port, tiny_config

# What sshd does: one line for the user's shell. Every option of ours takes a value.
SSH = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift 2; done
echo "$1" >>"$SSH_HOSTS"
shift
exec /bin/sh -c "$*"
"""


def test_hostfiles_are_read_as_deepspeed_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# two\nnode-1 slots=8\n\nuser@10.0.0.2   slots=8  # the other\nlast\n")
    assert read_hostfile(path) == [
        Host(name="node-1", slots=8),
        Host(name="user@10.0.0.2", slots=8),
        Host(name="last", slots=1),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("-oProxyCommand=x slots=1", "line 1"),
        ("a slots=1\nb; touch x slots=1", "line 2"),
        ("a slots=0", "line 1"),
        ("a slots=1\na slots=1", "names 2 hosts, 1 of them"),
        ("# nobody\n", "names 0 hosts"),
    ],
)
def test_what_is_no_hostfile_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_hostfile(tmp_path / "hosts")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hostfile(tmp_path / "nowhere")


@pytest.mark.parametrize("slots", [[1, 1], [1], [1, 2]])
def test_hosts_must_be_those_of_the_configuration(slots: list[int]) -> None:
    hosts = [Host(name=f"h{number}", slots=count) for number, count in enumerate(slots)]
    with pytest.raises(ConfigError, match=r"cluster\.nodes=1 with cluster\.gpus_per_node=1"):
        check_hosts([*hosts, Host(name="more", slots=2)], tiny_config())
    check_hosts(hosts[:1], tiny_config())


def test_a_path_reaches_the_remote_shell_as_one_word() -> None:
    *_, line = ssh_command(Host(name="a", slots=1), Path("/x y/$(z)'s/job.sh"), 3)
    done = subprocess.run(
        ["sh", "-c", line.replace("bash", "printf '%s|'", 1)], capture_output=True, text=True
    )
    assert done.stdout == "/x y/$(z)'s/job.sh|3|"


@pytest.fixture
def ssh(tmp_path: Path) -> dict[str, str]:
    """An environment whose ssh runs the command here, and notes the host."""
    program = tmp_path / "bin/ssh"
    program.parent.mkdir()
    program.write_text(SSH)
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "SSH_HOSTS": str(tmp_path / "ssh-hosts"), "OMP_NUM_THREADS": "1"}


def start(workspace: Path, tmp_path: Path, ssh: dict[str, str], steps: int) -> subprocess.Popen:
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    return subprocess.Popen(
        [
            sys.executable, "-m", "pretrain", "submit", *SMALL, "submit.to=hostfile",
            f"submit.hostfile={tmp_path / 'hosts'}", f"submit.port={free_port()}",
            "cluster.nodes=2", f"run.dir={tmp_path}/a run", f"run.steps={steps}",
        ],
        cwd=workspace, env=os.environ | ssh, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def logs(run_dir: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(run_dir.glob("hosts/*.log")))


def test_two_hosts_train_one_run_and_save_when_told_to_stop(
    workspace: Path, tmp_path: Path, ssh: dict[str, str]
) -> None:
    run_dir = tmp_path / "a run"
    process = start(workspace, tmp_path, ssh, steps=5000)
    record = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not record.exists() or len(read_metrics(record)) < 3:
        assert process.poll() is None, process.communicate()[0] + logs(run_dir)
        assert time.monotonic() < deadline, logs(run_dir)
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == EXIT_SAVED_ON_SIGNAL, output + logs(run_dir)
    assert set(Path(ssh["SSH_HOSTS"]).read_text().split()) == {"127.0.0.1", "localhost"}
    ranks = sorted(path.name for path in (run_dir / "logs").iterdir())
    assert ranks == ["rank-00000.log", "rank-00001.log"]
    assert (run_dir / "checkpoints/latest").is_file()


def test_a_part_whose_number_is_not_written_yet_is_told_later(
    tmp_path: Path, ssh: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ssh.items():
        monkeypatch.setenv(name, value)
    process = subprocess.Popen(["sleep", "60"])
    try:
        part = Part(Host(name="a", slots=1), tmp_path / "0.pid", process)
        part.stop()
        part.pid_file.touch()
        part.stop()
        assert part.teller is None
        part.pid_file.write_text(f"{process.pid}\n")
        part.stop()
        assert process.wait(timeout=30) == -signal.SIGTERM
    finally:
        part.give_up()


def test_a_host_that_does_not_answer_is_not_waited_for(
    tmp_path: Path, ssh: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sshd says nothing; the others are told, and the run ends when its patience does."""
    program = Path(ssh["PATH"].split(os.pathsep)[0]) / "ssh"
    program.write_text(
        SSH.replace("shift\nexec", '[ "$1" != hangs ] || exec sleep 600\nshift\nexec')
    )
    for name, value in ssh.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(hosts, "_PATIENCE_S", 5.0)
    parts = []
    for name in ("hangs", "answers"):
        parts.append(
            Part(
                Host(name=name, slots=1),
                tmp_path / f"{name}.pid",
                subprocess.Popen(["sleep", "60"]),
            )
        )
        parts[-1].pid_file.write_text(f"{parts[-1].process.pid}\n")
    try:
        started = time.monotonic()
        assert hosts._wait(parts, lambda: True) == -signal.SIGTERM
        assert time.monotonic() - started < 60
        assert [part.process.poll() for part in parts] == [None, -signal.SIGTERM]
    finally:
        for part in parts:
            part.give_up()
    assert parts[0].teller is not None
    assert parts[0].teller.poll() == -signal.SIGKILL


def test_a_host_that_fails_ends_the_others_with_its_code(
    workspace: Path, tmp_path: Path, ssh: dict[str, str]
) -> None:
    program = Path(ssh["PATH"].split(os.pathsep)[0]) / "ssh"
    # the second host cannot be reached
    program.write_text(SSH.replace("shift\nexec", '[ "$1" != localhost ] || exit 255\nshift\nexec'))
    process = start(workspace, tmp_path, ssh, steps=5)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 255, output
    assert "localhost ended with code 255" in output
    pid = int((tmp_path / "a run/hosts/0.pid").read_text())
    assert not Path(f"/proc/{pid}").exists()
