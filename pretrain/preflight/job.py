"""`pretrain doctor doctor.scope=job`: all ranks of a job together, started as training would be.

Do they run the same code with the same configuration, how fast are the links between them, how far
apart are their clocks, and does the engine compute right on them.
"""

import statistics
import time
from collections.abc import Iterator, Sequence

from pretrain.config import DoctorConfig
from pretrain.engine.world import World, join, leave
from pretrain.errors import PretrainError
from pretrain.preflight.compare import CLOCK_APART_S, unequal
from pretrain.preflight.findings import Finding, Status, refuse_missing, show
from pretrain.preflight.links import check_links
from pretrain.preflight.node import node_name
from pretrain.preflight.nvml import NoDriverError, read_driver
from pretrain.preflight.parity import check_parity
from pretrain.preflight.report import Measurements, NodeReport
from pretrain.preflight.versions import input_hashes, software_versions

CLOCK_ROUNDS = 9


def run(config: DoctorConfig) -> int | None:
    """Print what was found, on rank 0; the exit code on the others if something is missing.

    Raises ConfigError on rank 0 if the job could not train.
    """
    world = join(config.engine)
    findings = examine(config, world)
    world.barrier()
    leave(world)
    try:
        refuse_missing(findings, f"these {world.size} ranks", config.run.name)
    except PretrainError as error:
        if world.is_main:
            raise
        return error.exit_code
    if world.is_main:
        print(f"These {world.size} ranks can train {config.run.name}.")
    return None


def examine(config: DoctorConfig, world: World) -> list[Finding]:
    """All checks, the same findings on every rank; rank 0 prints them as they come."""
    hosts = world.gather_objects(node_name())
    findings = []
    checks = (
        check_equal(config, world, hosts),
        check_clocks(world, hosts),
        check_links(world, hosts),
        check_parity(config, world),
    )
    for check in checks:
        for finding in check:
            findings += show([finding]) if world.is_main else [finding]
    return findings


def check_equal(config: DoctorConfig, world: World, hosts: Sequence[str]) -> Iterator[Finding]:
    """Versions and hashes on all ranks."""
    try:
        driver = read_driver().version
    except NoDriverError:
        driver = ""
    mine = Measurements(versions=software_versions(driver), hashes=input_hashes(config))
    everyone = world.gather_objects(mine)
    reports = [
        NodeReport(node=f"rank {rank} on {host}", findings=[], measurements=measured)
        for rank, (host, measured) in enumerate(zip(hosts, everyone, strict=True))
    ]
    found = False
    for name, finding in unequal(reports):
        detail = f"{name}, {finding.subject}: {finding.detail}"
        yield Finding(finding.status, "ranks", detail, finding.remedy)
        found = True
    if not found:
        yield Finding(Status.ok, "ranks", f"{world.size} with equal versions, code and config")


def check_clocks(world: World, hosts: Sequence[str]) -> Iterator[Finding]:
    """Clocks of the nodes, read as all ranks come out of the same meeting, some times over."""
    readings = []
    for _ in range(CLOCK_ROUNDS):
        world.barrier()
        readings.append(time.time())
    everyone = world.gather_objects(readings)
    yield from judge_clocks(everyone, hosts)


def judge_clocks(readings: Sequence[Sequence[float]], hosts: Sequence[str]) -> Iterator[Finding]:
    """Clocks that are apart from rank 0's, by the median of the rounds.

    `readings`: of each rank, one for each round. A round is as good as the ranks leave a meeting
    together, so half the spread of a rank's differences is how far its median can be trusted.
    """
    worst, found = (0.0, 0.0), False
    # one rank speaks for its node
    for host in dict.fromkeys(hosts):
        rank = hosts.index(host)
        apart = [mine - first for mine, first in zip(readings[rank], readings[0], strict=True)]
        offset, doubt = statistics.median(apart), (max(apart) - min(apart)) / 2
        worst = max(worst, (abs(offset), doubt))
        if abs(offset) > CLOCK_APART_S + doubt:
            detail = f"{host} is {offset:+.2f} s from {hosts[0]} (true to {doubt:.3f} s)"
            yield Finding(Status.warn, "clock", detail, "have its time service looked at")
            found = True
    if not found:
        yield Finding(Status.ok, "clock", f"at most {worst[0]:.4f} s apart (+- {worst[1]:.4f} s)")
