"""`pretrain submit`: plan a run, freeze it with its code into its folder, and start it elsewhere.

Torch-free, so that it runs on a login node. The job reads the frozen config.yaml and runs from a
snapshot of the code: later edits of the checkout change no job that waits or queues again. A run
that exists is resumed.

With --multirun every combination of swept values is a run and a job of its own, not a task of an
array: nodes and time may be swept too, and each queues again and leaves out bad nodes by itself.
"""

import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.budget import advice, make_plan, usable_bytes
from pretrain.compose import (
    check_resumable,
    differences,
    load,
    refuse_secrets,
    thaw,
    write_frozen,
)
from pretrain.config import SubmitConfig, TrainConfig
from pretrain.engine.memory import GIB
from pretrain.errors import EXIT_FINISHED, ConfigError
from pretrain.jobs.config import ContainerKind, SubmitOptions, Target
from pretrain.jobs.hosts import Host, check_hosts, read_hostfile, run_on_hosts, ssh_command
from pretrain.jobs.progress import read_progress
from pretrain.jobs.queue import Submission, jobs_of, queued, record, sbatch, sbatch_command
from pretrain.jobs.script import (
    Place,
    batch_script,
    check_place,
    container_script,
    host_script,
    hosts_script,
    job_name,
)
from pretrain.jobs.snapshot import Snapshot, checkout, describe, take
from pretrain.jobs.sweeps import (
    Point,
    check_sweep_folder,
    print_table,
    read_sweep,
    report,
    swept_values,
    write_sweep,
)
from pretrain.loop.beginning import check_can_begin
from pretrain.multirun import combinations, refuse_shared_folders

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One run on its way: everything that is known before anything is written."""

    config: TrainConfig
    options: SubmitOptions
    place: Place
    snapshot: Snapshot
    changes: list[str]
    """What it sets differently in a run that was there."""
    hosts: list[Host]
    """Of submit.hostfile."""

    @property
    def folder(self) -> Path:
        """The run's folder, absolute."""
        return self.place.folder

    @property
    def script_path(self) -> Path:
        """Where the script is kept."""
        name = "job.sbatch" if self.options.to is Target.slurm else "job.sh"
        return self.folder / name

    @property
    def script(self) -> str:
        """What starts the run."""
        if self.options.to is Target.slurm:
            return batch_script(self.config, self.place, is_chain=self.options.chain > 1)
        if self.options.to is Target.host:
            return host_script(self.config, self.place)
        return hosts_script(
            self.config,
            self.place,
            first_host=self.hosts[0].name.rpartition("@")[2],
            port=self.options.port,
        )


def main(config: SubmitConfig) -> int:
    """Submit one run; the exit code. Raises ConfigError before anything is written."""
    job = _prepare(config, code_in=None)
    _print_plan(job)
    _warn_of_missing_data([config.run_config()])
    if _says_finished(job):
        return EXIT_FINISHED
    _refuse_stopped(job.folder)
    if job.options.to is Target.slurm:
        _check_jobs_of(job)
    if config.submit.dry_run:
        _print_dry_run(job)
        return EXIT_FINISHED
    _write(job)
    if job.options.to is Target.slurm:
        _print_queued(job, _queue(job))
        return EXIT_FINISHED
    print(f"starts {job.folder}; to stop it, Ctrl-C: it saves first", flush=True)
    if job.options.to is Target.host:
        # its signals and its exit code are the script's own
        os.execvp("bash", ["bash", str(job.script_path)])
    (job.folder / "hosts").mkdir(exist_ok=True)
    return run_on_hosts(job.hosts, job.script_path, job.folder)


def sweep(overrides: Sequence[str]) -> int:
    """Submit every combination of swept values and return at once; the exit code.

    All runs are checked before the first is submitted. Those that have a job, or all their steps,
    are left alone, so the same command goes on where sbatch refused. Raises ConfigError.
    """
    combined = combinations(overrides)
    configs = [load("submit", words, resumes=True) for words in combined]
    refuse_shared_folders([config.run.dir for config in configs])
    options = configs[0].submit
    if any(config.submit != options for config in configs) or options.to is not Target.slurm:
        raise ConfigError(
            "A sweep is submitted to SLURM, with the same submit.* for all its runs. Without "
            "SLURM, `pretrain train --multirun` trains them one after the other."
        )
    folder = Path(options.sweep_dir or f"out/sweeps/{time.strftime('%Y%m%d-%H%M%S')}")
    jobs = [_prepare(config, code_in=folder.absolute() / "code") for config in configs]
    swept = swept_values(combined)
    points = [
        Point(run_dir=str(job.folder), swept=own) for job, own in zip(jobs, swept, strict=True)
    ]
    check_sweep_folder(folder, points)
    _warn_of_missing_data([config.run_config() for config in configs])
    if options.dry_run:
        for job, own in zip(jobs, swept, strict=True):
            print(f"{job.folder}: {' '.join(f'{key}={value}' for key, value in own.items())}")
        _print_dry_run(jobs[0])
        return EXIT_FINISHED
    # first, so that `sweep status` finds those that were submitted before one is refused
    write_sweep(folder, points)
    there = queued() or []
    for job in jobs:
        if jobs_of(job.folder, there):
            print(f"{job.folder} has a job already")
        elif not _says_finished(job):
            _write(job)
            _queue(job)
    print_table(f"{len(jobs)} runs in {folder}", report(read_sweep(folder)))
    print(f"watch:    pretrain sweep status sweep.dir={shlex.quote(str(folder))}")
    print(f"results:  pretrain sweep collect sweep.dir={shlex.quote(str(folder))}")
    return EXIT_FINISHED


def _prepare(config: SubmitConfig, *, code_in: Path | None) -> Job:
    """Check all that can be checked here; the snapshot goes below the run's folder or `code_in`."""
    run, options = config.run_config(), config.submit
    refuse_secrets(run)
    run.batch.micro_steps(context=run.model.context, ranks=run.cluster.ranks)
    workdir = Path.cwd()
    folder = workdir / run.run.dir
    changes: list[str] = []
    try:
        check_can_begin(run)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read: {error}. Choose another run.dir.") from error
    if (folder / "config.yaml").is_file():
        old = thaw(folder)
        check_resumable(old, run)
        changes = [f"{key}={now} (was {was})" for key, (was, now) in differences(old, run).items()]
    hosts = read_hostfile(Path(options.hostfile)) if options.hostfile is not None else []
    if options.to is Target.hostfile:
        check_hosts(hosts, run)
    if options.to is not Target.slurm and run.cluster.container.kind is not ContainerKind.none:
        raise ConfigError(
            f"submit.to={options.to.value} starts no containers; start it inside one."
        )
    if options.to is Target.host and run.cluster.nodes != 1:
        raise ConfigError(
            f"submit.to=host is one host, and cluster.nodes={run.cluster.nodes}; use slurm or "
            "hostfile."
        )
    snapshot = describe(checkout(), code_in or folder / "code")
    python = os.environ.get("PRETRAIN_PYTHON") or sys.executable
    # a name is looked up where the job runs, a path begins here
    python = os.path.abspath(python) if os.sep in python else python
    place = Place(code=snapshot.folder, workdir=workdir, python=python, run_dir=run.run.dir)
    check_place(place, options.to)
    return Job(
        config=run, options=options, place=place, snapshot=snapshot, changes=changes, hosts=hosts
    )


def _refuse_stopped(folder: Path) -> None:
    request = folder / "control/stop"
    if request.exists():
        raise ConfigError(f"{request} asks the run to stop, so a job would end at once; remove it.")


def _check_jobs_of(job: Job) -> None:
    """Refuse a second job that would not wait; say what the first may see of the second."""
    own = jobs_of(job.folder, queued() or [])
    shown = ", ".join(f"{each.job_id} is {each.state}" for each in own)
    if own and job.options.after is None:
        raise ConfigError(
            f"{job.folder} has a job already: {shown}. End it with scancel, or let the new one "
            f"wait for it with submit.after={own[-1].job_id}."
        )
    if own and job.changes:
        log.warning(
            "%s has a job already: %s. The changes are written to its config.yaml now, so if that "
            "job queues itself again, it goes on with them.",
            job.folder,
            shown,
        )


def _says_finished(job: Job) -> bool:
    """Whether the run has nothing left to do, which is then said."""
    if not (job.folder / "config.yaml").is_file():
        return False
    progress = read_progress(job.folder, job.config)
    if progress.has_all_steps:
        but = f", but {progress.trouble}" if progress.trouble else ""
        print(
            f"{job.folder} has all its {progress.saved_step} steps{but}; give more with "
            "run.steps=..."
        )
    else:
        print(f"resumes {job.folder} at step {progress.saved_step} of {progress.last_step}")
    return progress.has_all_steps


def _print_plan(job: Job) -> None:
    """What the run costs, in a few lines; `pretrain plan` has the tables."""
    plan = make_plan(job.config)
    cluster = job.config.cluster
    needed, usable = plan.memory.total / GIB, usable_bytes(job.config) / GIB
    waiting = 1 - 1 / plan.wait
    lives = plan.hours * 3600 / (cluster.time_s - cluster.grace_s)
    for name, value in (
        ("run", str(job.folder)),
        ("ranks", f"{cluster.ranks:,} on {cluster.nodes:,} host{'s' * (cluster.nodes > 1)}"),
        ("steps", f"{job.config.total_steps:,} = {job.config.total_tokens:,} tokens"),
        ("memory", f"{needed:.1f} of {usable:.1f} GiB a rank, an estimate"),
        ("speed", f"{plan.tokens_per_s:,.0f} tokens/s expected"),
        ("idle", f"{plan.estimate.step.idle:.1%} of a step, {waiting:.1%} waiting for deeper rows"),
        ("hours", f"{plan.hours:,.1f}, {plan.hours * cluster.ranks:,.0f} rank hours"),
        ("lives", f"{lives:,.1f} of {cluster.time} each"),
        ("code", str(job.snapshot)),
    ):
        print(f"{name:<8}{value}")
    for line in advice(plan):
        print(line)
    for change in job.changes:
        print(f"changes {change}")


def _warn_of_missing_data(configs: Sequence[TrainConfig]) -> None:
    """Say what the jobs will look for and is not there yet; a job of its own may be making it."""
    shards = [config.data.shards for config in configs if "://" not in config.data.shards]
    wanted = [Path(folder) / "manifest.json" for folder in shards]
    wanted += [Path(config.tokenizer.path) for config in configs]
    for path in dict.fromkeys(wanted):
        if not path.exists():
            log.warning(
                "%s is not there yet, and a job that starts without it ends with 65. `pretrain "
                "data tokenizer`, then `pretrain data build` or slurm/data.sbatch make it.",
                path,
            )


def _print_dry_run(job: Job) -> None:
    print(f"\n{job.script_path}:\n{job.script}")
    if job.config.cluster.container.kind is not ContainerKind.none:
        print(f"{job.place.container_file}:\n{container_script(job.config.cluster.container)}")
    if job.options.to is Target.slurm:
        print(shlex.join(sbatch_command(job.script_path, job.options.after)))
        if job.options.chain > 1:
            print(f"and {job.options.chain - 1} more, each behind the one before")
    elif job.options.to is Target.host:
        print(shlex.join(["bash", str(job.script_path)]))
    for number, host in enumerate(job.hosts):
        print(shlex.join(ssh_command(host, job.script_path, number)))


def _write(job: Job) -> None:
    """The run's folder: configuration, code, script."""
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        taken = take(checkout(), job.snapshot.folder.parent)
        if taken != job.snapshot:
            raise ConfigError("The checkout was edited during the submission; submit again.")
        write_frozen(job.config, job.folder)
        if job.config.cluster.container.kind is not ContainerKind.none:
            text = container_script(job.config.cluster.container)
            job.place.container_file.write_text(text, encoding="utf-8")
        job.script_path.write_text(job.script, encoding="utf-8")
        job.script_path.chmod(0o755)
    except OSError as error:
        raise ConfigError(f"{job.folder} cannot be written: {error}.") from error


def _queue(job: Job) -> list[str]:
    """Submit the run's job, or its chain; their ids, each recorded before the next one."""
    ids: list[str] = []
    for _ in range(job.options.chain):
        ids.append(sbatch(job.script_path, ids[-1] if ids else job.options.after))
        submission = Submission(
            job_id=ids[-1],
            when=time.strftime("%Y-%m-%d %H:%M:%S %z"),
            tree_sha256=job.snapshot.tree_sha256,
            commit=job.snapshot.commit,
            diff_sha256=job.snapshot.diff_sha256,
            code=str(job.snapshot.folder),
            changes=job.changes,
        )
        record(job.folder, [submission])
    return ids


def _print_queued(job: Job, ids: Sequence[str]) -> None:
    folder, name = shlex.quote(str(job.folder)), job_name(job.config.run.name)
    logs = shlex.quote(str(job.place.code / "slurm/logs" / f"{name}-{ids[0]}"))
    print(
        f"submitted {', '.join(ids)}\n"
        f"watch:    squeue --jobs={','.join(ids)}\n"
        f"          tail -F {folder}/slurm-{ids[0]}.log {logs}/rank-0.log\n"
        f"stop:     touch {folder}/control/stop      # saves first, and ends a chain\n"
        f"          scancel {' '.join(reversed(ids))}      # does not wait for a step\n"
        f"save and queue again: scancel --signal=USR1 {ids[0]}\n"
        f"go on:    pretrain submit run.dir={shlex.quote(job.place.run_dir)}"
    )
