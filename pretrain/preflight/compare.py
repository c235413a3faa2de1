"""`pretrain doctor doctor.scope=compare`: the nodes of a job side by side. Torch-free.

Reads the files that doctor.scope=node has left in doctor.folder, judges them together, and writes
ok=false, with the reason, into those of nodes that differ from the others or are slow.
"""

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from pretrain.config import DoctorConfig
from pretrain.errors import DataError
from pretrain.preflight.findings import Finding, Status, blocking, refuse_missing, show
from pretrain.preflight.outliers import slow_ones
from pretrain.preflight.report import Measurements, NodeReport, read_report

# Marks what was found here, so that a second comparison replaces it.
MARK = "beside others"
# Certificates and tickets bear more; logs of several nodes are hard to read from here on.
CLOCK_APART_S = 1.0

Verdicts = dict[str, list[Finding]]


def run(config: DoctorConfig) -> None:
    """Print the verdicts, write them into the nodes' files.

    Raises DataError if the folder holds no reports, ConfigError or DataError if a node is not fit.
    """
    assert config.doctor.folder is not None
    folder = Path(config.doctor.folder)
    reports = read_reports(folder)
    verdicts = judge(reports)
    for report in reports:
        report.findings += verdicts[report.node]
        report.write(folder)
    nodes = ", ".join(report.node for report in reports if not report.is_ok)
    show(finding for report in reports for finding in _named(report))
    found = [finding for report in reports for finding in report.findings]
    refuse_missing(found, nodes, config.run.name)
    print(f"{len(reports)} nodes agree, and none is slow.")


def read_reports(folder: Path) -> list[NodeReport]:
    """All nodes' reports, less what an earlier comparison added; a damaged one is a bad node."""
    reports = []
    for path in sorted(folder.glob("*.json")):
        try:
            report = read_report(path)
        except DataError as error:
            remedy = "exclude the node, or start its doctor.scope=node again"
            damage = Finding(Status.missing, "report", str(error), remedy, DataError)
            report = NodeReport(node=path.stem, findings=[damage], measurements=Measurements())
        report.findings = [f for f in report.findings if not f.subject.startswith(MARK)]
        reports.append(report)
    if not reports:
        raise DataError(
            f"{folder} holds no report of a node; start `pretrain doctor doctor.scope=node "
            f"doctor.folder={folder}` once on every node first."
        )
    return reports


def judge(reports: Sequence[NodeReport]) -> Verdicts:
    """What each node's neighbours say of it; nothing for a node that is like the others."""
    verdicts: Verdicts = {report.node: [] for report in reports}
    for node, finding in (*unequal(reports), *_slow(reports), *_clocks_apart(reports)):
        verdicts[node].append(finding)
    return verdicts


def unequal(reports: Sequence[NodeReport]) -> Iterator[tuple[str, Finding]]:
    """Nodes whose versions or hashes are not those of most nodes.

    If no value has a majority, the first of the commonest ones, in the order given, counts: what
    remains agrees, though nobody knows that it is right.
    """
    tables = {report.node: _comparable(report.measurements) for report in reports}
    tables = {node: table for node, table in tables.items() if table}
    for name in dict.fromkeys(name for table in tables.values() for name in table):
        values = {node: table.get(name, "none") for node, table in tables.items()}
        # of equally frequent values the one met first
        usual, frequency = Counter(values.values()).most_common(1)[0]
        for node, value in values.items():
            if value != usual:
                yield (
                    node,
                    Finding(
                        Status.missing,
                        f"{MARK}: {name}",
                        f"{value[:40]}, but {usual[:40]} on {frequency} of {len(values)}",
                        "give all the same software, code and files, or exclude the node",
                    ),
                )


def _comparable(measured: Measurements) -> dict[str, str]:
    """What must be equal; nothing of a node whose report is damaged."""
    table = measured.versions | measured.hashes
    if measured.devices:
        counts = Counter(measured.devices)
        table["devices"] = ", ".join(f"{count} {name}" for name, count in counts.items())
    return table


def _slow(reports: Sequence[NodeReport]) -> Iterator[tuple[str, Finding]]:
    """Nodes with a device that is slower than those of all nodes together (`slow_ones`).

    Only a warning on CPUs, whose speed depends on what else runs there.
    """
    on_cpu = {report.node for report in reports if report.measurements.devices == ["cpu"]}
    for name in dict.fromkeys(name for report in reports for name in report.measurements.rates):
        places = [
            (report.node, device, rate)
            for report in reports
            for device, rate in enumerate(report.measurements.rates.get(name, []))
        ]
        rates = [rate for _, _, rate in places]
        for index in slow_ones(rates):
            node, device, rate = places[index]
            others = statistics.median(rates[:index] + rates[index + 1 :])
            status = Status.warn if node in on_cpu else Status.missing
            detail = (
                f"device {device}: {rate:.4g}, {100 * (1 - rate / others):.0f} % below the "
                f"median of the {len(rates) - 1} others, {others:.4g}"
            )
            remedy = "exclude the node, and look at it"
            yield node, Finding(status, f"{MARK}: {name}", detail, remedy)


def _clocks_apart(reports: Sequence[NodeReport]) -> Iterator[tuple[str, Finding]]:
    """Nodes whose clock is not that of most nodes; no reason to refuse one."""
    clocks = {r.node: r.measurements.clock for r in reports if r.measurements.clock is not None}
    if not clocks:
        return
    usual = statistics.median(clock.offset_s for clock in clocks.values())
    for node, clock in clocks.items():
        apart = clock.offset_s - usual
        if abs(apart) > CLOCK_APART_S + clock.resolution_s:
            yield (
                node,
                Finding(
                    Status.warn,
                    f"{MARK}: clock",
                    f"{apart:+.2f} s from most nodes' (true to {clock.resolution_s:.2f} s); "
                    "training does not mind, readers of logs will",
                    "have its time service looked at",
                ),
            )


def _named(report: NodeReport) -> Iterator[Finding]:
    """What is wrong with a node, or that nothing is."""
    wrong = [finding for finding in report.findings if finding.status is not Status.ok]
    for finding in wrong:
        detail = f"{finding.subject}: {finding.detail}"
        yield Finding(finding.status, report.node, detail, finding.remedy, finding.error)
    if not blocking(wrong):
        yield Finding(Status.ok, report.node, "as the others are")
