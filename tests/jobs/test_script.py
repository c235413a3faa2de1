"""A script says what the configuration says, to bash and to shellcheck, whatever the values are."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.budget import make_plan, usable_bytes
from pretrain.compose import load
from pretrain.config import TrainConfig
from pretrain.engine.config import Device
from pretrain.errors import ConfigError
from pretrain.jobs.config import ClusterConfig, ContainerConfig, ContainerKind, Target
from pretrain.jobs.script import (
    Place,
    batch_script,
    check_place,
    container_script,
    host_script,
    hosts_script,
    job_name,
)
from pretrain.testing import tiny_config

SHELLCHECK = shutil.which("shellcheck") or shutil.which(
    "shellcheck", path=str(Path(sys.executable).parent)
)
HOSTILE = [
    "with a blank",
    "quote's",
    'double "quoted"',
    "$HOME $(touch pwned) `touch pwned`",
    "semi; touch pwned & false | true",
    "back\\slash",
    "trailing\\",
    "back\\'quoted",
    'back\\"quoted',
    "two\\\\",
    "\\\\'",
    "üñî 漢字",
    "*?[a-z]{b,c}~",
    "#hash",
    "-dash",
    "%j %x",
    "a,b=c:d",
]


def cluster(**changes: Any) -> ClusterConfig:
    return dataclasses.replace(
        tiny_config().cluster, **({"nodes": 2, "gpus_per_node": 4} | changes)
    )


def place(tmp_path: Path, run_dir: str = "out/runs/one") -> Place:
    return Place(code=tmp_path / "code", workdir=tmp_path, python=sys.executable, run_dir=run_dir)


def everything(config: TrainConfig, tmp_path: Path) -> str:
    """All that submitting shows and writes about the cluster."""
    text = batch_script(config, place(tmp_path))
    if config.cluster.container.kind is not ContainerKind.none:
        text += container_script(config.cluster.container)
    plan = make_plan(config)
    return f"{text}{plan.tokens_per_s} {usable_bytes(config)}"


CONTAINER = ContainerConfig(kind=ContainerKind.apptainer, image="a.sif", mounts=["/data"])
CHANGED: dict[str, Any] = {
    "nodes": 1,
    "gpus_per_node": 2,
    "gpu_memory_bytes": 1 << 35,
    "gpu_flops": 2e12,
    "utilization": 0.25,
    "hardware": dataclasses.replace(tiny_config().cluster.hardware, forward_utilization=0.25),
    "partition": "gpu",
    "account": "me",
    "qos": "high",
    "constraint": "a&b",
    "time": "90",
    "grace_s": 60,
    "cpus_per_gpu": 3,
    "exclusive": True,
    "options": ["--mail-type=END"],
    "interface": "ib0",
    "environment": {"NCCL_IB_HCA": "mlx5"},
    "container": CONTAINER,
    "max_requeues": 7,
    "max_resubmits": 8,
    "preflight": False,
}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ClusterConfig)])
def test_every_field_of_the_cluster_changes_the_job_or_its_plan(name: str, tmp_path: Path) -> None:
    before = everything(tiny_config(cluster=cluster()), tmp_path)
    after = everything(tiny_config(cluster=cluster(**{name: CHANGED[name]})), tmp_path)
    assert before != after


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ContainerConfig)])
def test_every_field_of_a_container_changes_its_words(name: str) -> None:
    changed = {"kind": ContainerKind.pyxis, "image": "b.sif", "mounts": ["/data:/elsewhere"]}
    other = dataclasses.replace(CONTAINER, **{name: changed[name]})
    assert container_script(other) != container_script(CONTAINER)


def test_the_header_is_what_sbatch_takes(tmp_path: Path) -> None:
    named = {name: CHANGED[name] for name in ("partition", "account", "qos", "constraint", "time")}
    config = tiny_config(cluster=cluster(**named, exclusive=True, options=["--gres=gpu:4"]))
    lines = batch_script(config, place(tmp_path)).splitlines()
    assert [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")] == [
        f"--job-name={config.run.name}", "--nodes=2", "--ntasks-per-node=4",
        "--cpus-per-task=8", "--time=90", "--signal=USR1@300", "--partition=gpu", "--account=me",
        "--qos=high", "--constraint=a&b", "--exclusive", "--mem=0", "--gres=gpu:4", "--requeue",
        "--open-mode=append", f'--chdir="{tmp_path}/out/runs/one"', "--output=slurm-%j.log",
    ]  # fmt: skip


def test_gpus_are_asked_for_unless_the_run_is_for_cpus(tmp_path: Path) -> None:
    config = tiny_config(cluster=cluster())
    assert config.engine.device is Device.cpu
    assert "--gpus-per-node" not in batch_script(config, place(tmp_path))
    engine = dataclasses.replace(config.engine, device=Device.auto)
    script = batch_script(tiny_config(cluster=cluster(), engine=engine), place(tmp_path))
    assert "#SBATCH --gpus-per-node=4\n" in script


@pytest.mark.parametrize(
    ("option", "is_theirs"),
    [
        ("--gres=gpu:h200:4", True),
        ("--gres=nvme:1,gpu:4", True),
        ("--gpus-per-node=h200:4", True),
        ("--gres=nvme:1", False),
        ("--gpu-bind=closest", False),
    ],
)
def test_gpus_are_asked_for_once(option: str, is_theirs: bool, tmp_path: Path) -> None:
    engine = dataclasses.replace(tiny_config().engine, device=Device.auto)
    config = tiny_config(cluster=cluster(options=[option]), engine=engine)
    script = batch_script(config, place(tmp_path))
    assert f"#SBATCH {option}\n" in script
    # sbatch refuses GPUs with a type beside GPUs without one
    assert ("#SBATCH --gpus-per-node=4\n" not in script) == is_theirs


def test_scripts_are_clean_to_shellcheck(tmp_path: Path) -> None:
    assert SHELLCHECK is not None
    for number, value in enumerate(["plain", *HOSTILE]):
        container = ContainerConfig(kind=ContainerKind.pyxis, image=value, mounts=["/a", "/b"])
        environment = {"SOME": value, "PATHS": f"{value}\n{value}"}
        config = tiny_config(cluster=cluster(environment=environment, container=container))
        where = place(tmp_path, f"runs/{value}")
        for kind, text in {
            "batch": batch_script(config, where, is_chain=True),
            "host": host_script(config, where),
            "hosts": hosts_script(config, where, first_host="a.b", port=1234),
            "container": container_script(container),
        }.items():
            (tmp_path / f"{number}-{kind}.sh").write_text(text)
    names = sorted(path.name for path in tmp_path.iterdir())
    done = subprocess.run(
        [SHELLCHECK, "--shell=bash", *names], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


SHOW = (
    '#!/usr/bin/env bash\nprintf "%s\\0" "$@" "$SOME" "$PRETRAIN_WORKDIR" "$PRETRAIN_CONTAINER"\n'
)


@pytest.mark.parametrize("value", HOSTILE)
def test_bash_gives_the_job_what_was_configured(value: str, tmp_path: Path) -> None:
    workdir = tmp_path / value
    code = workdir / "code"
    (code / "launch").mkdir(parents=True)
    (code / "launch/job.sh").write_text(SHOW)
    (code / "launch/job.sh").chmod(0o755)
    container = ContainerConfig(kind=ContainerKind.apptainer, image=value, mounts=["/data"])
    config = tiny_config(cluster=cluster(environment={"SOME": f"{value}\n"}, container=container))
    where = Place(code=code, workdir=workdir, python=sys.executable, run_dir=f"runs/{value}")
    check_place(where, Target.host)
    script = tmp_path / "job.sbatch"
    script.write_text(batch_script(config, where))
    done = subprocess.run(["bash", script], capture_output=True, check=True, cwd=tmp_path)
    override, some, at, container_file, end = done.stdout.decode().split("\0")
    assert (some, at, end) == (f"{value}\n", str(workdir), "")
    # what the program makes of its argument
    assert load("train", [override]).run.dir == f"runs/{value}"
    assert Path(container_file) == where.folder / "container.sh"
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("value", [*HOSTILE, "line\nbreak"])
def test_a_container_gets_its_words_unchanged(value: str, tmp_path: Path) -> None:
    container = ContainerConfig(
        kind=ContainerKind.apptainer, image=value, mounts=["/data", "/a b:/c"]
    )
    (tmp_path / "container.sh").write_text(container_script(container))
    show = 'source ./container.sh; printf "%s\\0" "${container[@]}"'
    done = subprocess.run(["bash", "-c", show], cwd=tmp_path, capture_output=True, check=True)
    words = ["apptainer", "exec", "--nv", "--bind", "/data", "--bind", "/a b:/c", value]
    assert done.stdout.decode().split("\0") == [*words, ""]
    assert not (tmp_path / "pwned").exists()


def test_pyxis_takes_its_container_from_options_of_srun() -> None:
    container = ContainerConfig(
        kind=ContainerKind.pyxis, image="repo#name:tag", mounts=["/data", "/a:/b"]
    )
    text = container_script(container)
    assert "'--container-image=repo#name:tag'" in text
    assert "'--container-mounts=/data:/data,/a:/b'" in text


@pytest.mark.parametrize("run_dir", ["two\nlines", "tab\there", "${run.name}"])
def test_a_run_folder_that_cannot_be_spelled_is_refused(run_dir: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"choose another run\.dir"):
        check_place(place(tmp_path, run_dir), Target.host)


@pytest.mark.parametrize("run_dir", ["100%", "back\\slash"])
def test_slurm_expands_some_characters_in_the_names_of_logs(run_dir: str, tmp_path: Path) -> None:
    check_place(place(tmp_path, run_dir), Target.host)
    with pytest.raises(ConfigError, match="SLURM reads as its own"):
        check_place(place(tmp_path, run_dir), Target.slurm)


def test_a_job_has_a_name_that_slurm_can_show() -> None:
    assert job_name("lr-1e-3_big.run") == "lr-1e-3_big.run"
    assert job_name("a b;$(x)\n") == "a-b-x-"
    assert job_name("//") == "-"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"time": "24:00"}, "HH:MM:SS"),
        # what YAML makes of 12:00:00
        ({"time": "43200"}, "quote it"),
        ({"time": "5", "grace_s": 300}, "is not below"),
        ({"partition": "a\n#SBATCH --nodes=9"}, r"cluster\.partition"),
        ({"account": "a b"}, r"cluster\.account"),
        ({"interface": "$(x)"}, r"cluster\.interface"),
        ({"options": ["-N9"]}, "--name=value"),
        ({"environment": {"A B": "c"}}, "no name of a variable"),
    ],
    ids=str,
)
def test_what_would_break_a_header_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        cluster(**changes)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("02:00:30", 7230), ("2-01:00:00", 176_400), ("100:00:00", 360_000)],
)
def test_times_are_read_as_slurm_reads_them(time: str, seconds: int) -> None:
    assert cluster(time=time).time_s == seconds


@pytest.mark.parametrize(
    "given",
    [
        {"kind": ContainerKind.pyxis},
        {"image": "a.sif"},
        {"mounts": ["/data"]},
        {"kind": ContainerKind.pyxis, "image": "a", "mounts": ["/a,/b"]},
        {"kind": ContainerKind.pyxis, "image": "a", "mounts": ["relative"]},
    ],
    ids=str,
)
def test_half_a_container_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.container"):
        ContainerConfig(**given)
