"""What a node says of itself: NODE.json in doctor.folder. Torch-free.

    {"node": "n03", "ok": false,
     "findings": [{"status": "missing", "subject": "gpu 3", "detail": "...", "remedy": "...",
                   "error": "ConfigError"}],
     "measurements": {"versions": {}, "hashes": {}, "devices": [], "rates": {}, "clock": {}}}

The launcher excludes a node whose file says ok=false, or that left none; if all are so before they
are compared, it ends the job and names the findings.
"""

import dataclasses
import json
import os
from pathlib import Path

from pretrain.errors import ConfigError, DamageError, DataError
from pretrain.preflight.findings import Finding, Status, blocking
from pretrain.preflight.host import Clock
from pretrain.secrets import redact, secret_values

# What a finding may make of the command, by name.
ERRORS = {kind.__name__: kind for kind in (ConfigError, DataError, DamageError)}


@dataclasses.dataclass(kw_only=True, slots=True)
class Measurements:
    """What can be compared between nodes."""

    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    """Of software, by name."""
    hashes: dict[str, str] = dataclasses.field(default_factory=dict)
    """sha256 of code, config, tokenizer and shards."""
    devices: list[str] = dataclasses.field(default_factory=list)
    """What the node computes on."""
    rates: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """Speeds by name, one for each device; higher is faster."""
    clock: Clock | None = None
    """Against the file system of doctor.folder."""


@dataclasses.dataclass(kw_only=True, slots=True)
class NodeReport:
    """A node, what was found on it, and what was measured."""

    node: str
    """As the launcher calls it."""
    findings: list[Finding]
    measurements: Measurements

    @property
    def is_ok(self) -> bool:
        """Whether the node can take part."""
        return not blocking(self.findings)

    def write(self, folder: Path) -> Path:
        """Write NODE.json, whole or not at all, and without secrets of the environment."""
        content = {
            "node": self.node,
            "ok": self.is_ok,
            "findings": [
                {
                    "status": finding.status.value,
                    "subject": finding.subject,
                    "detail": finding.detail,
                    "remedy": finding.remedy,
                    "error": finding.error.__name__,
                }
                for finding in self.findings
            ],
            "measurements": dataclasses.asdict(self.measurements),
        }
        text = redact(json.dumps(content, indent=1), secret_values(os.environ))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.node}.json"
        temporary = folder / f".{self.node}.json.tmp-{os.getpid()}"
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(path)
        return path


def read_report(path: Path) -> NodeReport:
    """A node's file. Raises DataError if it is no report."""
    try:
        content = json.loads(path.read_bytes())
        measured = content["measurements"]
        clock = measured.pop("clock")
        return NodeReport(
            node=content["node"],
            findings=[
                Finding(
                    Status(found["status"]),
                    found["subject"],
                    found["detail"],
                    found["remedy"],
                    ERRORS[found["error"]],
                )
                for found in content["findings"]
            ],
            measurements=Measurements(**measured, clock=clock and Clock(**clock)),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is no report of a node ({type(error).__name__}: {error})."
        ) from error
