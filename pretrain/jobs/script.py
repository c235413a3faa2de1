"""The scripts that start a run: a batch script for SLURM, a plain one for hosts.

Values are quoted for bash one by one, and a script holds no configuration but the run's folder:
the job reads the frozen config.yaml there.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.config import TrainConfig
from pretrain.engine.config import Device
from pretrain.errors import ConfigError
from pretrain.jobs.config import ClusterConfig, ContainerConfig, ContainerKind, Target

# Options of sbatch that ask for GPUs; it refuses two that name them with and without their type.
_ASKS_FOR_GPUS = re.compile(r"--gpus.*|--gres=(?:[^,]*,)*gpu\b.*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a job finds its code, its interpreter and its files."""

    code: Path
    """The snapshot, absolute."""
    workdir: Path
    """Relative paths of the configuration begin here."""
    python: str
    """The interpreter that has what the project needs."""
    run_dir: str
    """The run's folder as configured."""

    @property
    def folder(self) -> Path:
        """The run's folder, absolute."""
        return self.workdir / self.run_dir

    @property
    def container_file(self) -> Path:
        """Where the container's words are, if there is one."""
        return self.folder / "container.sh"


def check_place(place: Place, target: Target) -> None:
    """Raise ConfigError for a run folder that no script or override can spell."""
    if target is Target.slurm and (found := re.search(r"[%\\]", str(place.folder))):
        raise ConfigError(
            f"run.dir={place.folder} has {found[0]!r}, which SLURM reads as its own in the name of "
            "a log; choose another run.dir or run.name."
        )
    if not str(place.folder).isprintable() or "${" in str(place.folder):
        raise ConfigError(
            f"run.dir={str(place.folder)!r} has a control character or an unresolved ${{...}}; "
            "choose another run.dir or run.name."
        )


def batch_script(config: TrainConfig, place: Place, *, is_chain: bool = False) -> str:
    """The script for sbatch: header, environment, and launch/job.sh with the run's folder.

    In a chain it first looks whether an earlier job has finished the run.
    """
    cluster = config.cluster
    lines = [
        "#!/usr/bin/env bash",
        f"# Trains a run on {cluster.nodes} nodes, {cluster.gpus_per_node} ranks each. Made by "
        "`pretrain submit`, which makes it anew",
        "# when the run is submitted again.",
        *(f"#SBATCH {option}" for option in _header(config, place)),
        *_environment(cluster, place),
        f"export PRETRAIN_MAX_REQUEUES={cluster.max_requeues}",
        f"export PRETRAIN_MAX_RESUBMITS={cluster.max_resubmits}",
        f"export PRETRAIN_PREFLIGHT={int(cluster.preflight)}",
    ]
    if cluster.container.kind is not ContainerKind.none:
        lines += [
            "# an array of words that srun puts before each process",
            f"export PRETRAIN_CONTAINER={shlex.quote(str(place.container_file))}",
        ]
    if is_chain:
        lines += [
            "",
            "# An earlier job of the chain may have left nothing to do. Who cannot tell goes on.",
            'if "$PRETRAIN_PYTHON" -m pretrain.jobs.progress '
            f"{shlex.quote(str(place.folder))}; then",
            "    exit 0",
            "fi",
        ]
    lines += ["", f"exec launch/job.sh {shlex.quote(run_override(place.run_dir))}", ""]
    return _with_directives(lines)


def container_script(container: ContainerConfig) -> str:
    """A bash file that sets the array `container` to words between srun's options and a process."""
    assert container.image is not None
    if container.kind is ContainerKind.pyxis:
        words = [f"--container-image={container.image}"]
        if container.mounts:
            # enroot wants a target for each
            pairs = (text if ":" in text else f"{text}:{text}" for text in container.mounts)
            words.append(f"--container-mounts={','.join(pairs)}")
    else:
        binds = [word for mount in container.mounts for word in ("--bind", mount)]
        words = ["apptainer", "exec", "--nv", *binds, container.image]
    # each in quotes, also where bash needs none: commas in an array look like a mistake
    text = "\n".join("    '" + word.replace("'", "'\\''") + "'" for word in words)
    return f"# shellcheck shell=bash disable=SC1003,SC2016,SC2034\ncontainer=(\n{text}\n)\n"


def host_script(config: TrainConfig, place: Place) -> str:
    """All ranks of a run on one host, as plain processes that keep their exit codes."""
    ranks = config.cluster.gpus_per_node
    override = shlex.quote(run_override(place.run_dir))
    lines = [
        "#!/usr/bin/env bash",
        f"# Trains a run with {ranks} ranks on this host. Made by `pretrain submit`.",
        *_environment(config.cluster, place),
        "",
        f"exec launch/plain.sh {ranks} {override}",
        "",
    ]
    return _with_directives(lines)


def hosts_script(config: TrainConfig, place: Place, *, first_host: str, port: int) -> str:
    """One host's ranks of a run on several: `bash SCRIPT NUMBER`, hosts numbered from 0.

    The script leaves its process id in the run's folder, so that it can be told to stop.
    """
    cluster = config.cluster
    lines = [
        "#!/usr/bin/env bash",
        f"# Trains a run on {cluster.nodes} hosts, {cluster.gpus_per_node} ranks each: one host's "
        "part, by its number.",
        *_environment(cluster, place),
        f"export LOCAL_WORLD_SIZE={cluster.gpus_per_node}",
        "# shellcheck source=/dev/null",
        "source launch/env/threads.sh",
        "",
        f'echo $$ >{shlex.quote(str(place.folder / "hosts"))}/"$1".pid',
        'exec "$PRETRAIN_PYTHON" -m torch.distributed.run \\',
        f'    --nnodes {cluster.nodes} --node-rank "$1" '
        f"--nproc-per-node {cluster.gpus_per_node} \\",
        f"    --master-addr {shlex.quote(first_host)} --master-port {port} \\",
        f"    --no-python launch/node.sh train {shlex.quote(run_override(place.run_dir))}",
        "",
    ]
    return _with_directives(lines)


def run_override(run_dir: str) -> str:
    """`run.dir=...` in Hydra's spelling: quoted, and a backslash before a quote doubled."""
    text = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), run_dir)
    is_plain = re.fullmatch(r"[\w./-]+", run_dir) is not None
    return f"run.dir={run_dir}" if is_plain else f"run.dir='{text}'"


def job_name(run_name: str) -> str:
    """The run's name as SLURM shows it: letters, digits, dots, dashes."""
    return re.sub(r"[^\w.-]+", "-", run_name)[:60] or "pretrain"


def _header(config: TrainConfig, place: Place) -> Sequence[str]:
    cluster = config.cluster
    ranks = cluster.gpus_per_node
    options = [
        f"--job-name={job_name(config.run.name)}",
        f"--nodes={cluster.nodes}",
        f"--ntasks-per-node={ranks}",
    ]
    has_asked = any(_ASKS_FOR_GPUS.fullmatch(option) for option in cluster.options)
    if config.engine.device is not Device.cpu and not has_asked:
        options.append(f"--gpus-per-node={ranks}")
    if cluster.cpus_per_gpu is not None:
        options.append(f"--cpus-per-task={cluster.cpus_per_gpu}")
    options += [f"--time={cluster.time}", f"--signal=USR1@{cluster.grace_s}"]
    for name in ("partition", "account", "qos", "constraint"):
        if (value := getattr(cluster, name)) is not None:
            options.append(f"--{name}={value}")
    if cluster.exclusive:
        options += ["--exclusive", "--mem=0"]
    return [
        *options,
        *cluster.options,
        "--requeue",
        "--open-mode=append",
        f"--chdir={_quoted_for_header(str(place.folder))}",
        # relative to the folder above
        "--output=slurm-%j.log",
    ]


def _quoted_for_header(text: str) -> str:
    r"""As sbatch reads its own lines: in double quotes, where \ makes the next character plain."""
    return '"' + text.replace('"', '\\"') + '"'


def _environment(cluster: ClusterConfig, place: Place) -> list[str]:
    pairs = {"PRETRAIN_PYTHON": place.python, "PRETRAIN_WORKDIR": str(place.workdir)}
    if cluster.interface is not None:
        pairs |= {"NCCL_SOCKET_IFNAME": cluster.interface, "GLOO_SOCKET_IFNAME": cluster.interface}
    pairs |= cluster.environment
    return [
        "set -euo pipefail",
        "",
        f"cd {shlex.quote(str(place.code))}",
        *(f"export {name}={shlex.quote(value)}" for name, value in pairs.items()),
    ]


def _with_directives(lines: list[str]) -> str:
    """The text; if it has quoted values, it tells shellcheck that they are meant as they are."""
    body = "\n".join(lines)
    if "'" not in body:
        return body
    directive = "# Quoted values are meant as they are.\n# shellcheck disable=SC1003,SC2016\n"
    return body.replace("set -euo pipefail\n", f"{directive}set -euo pipefail\n", 1)
