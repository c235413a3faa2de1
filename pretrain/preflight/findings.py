"""Findings: what was looked at, what is wrong with it, what to do about it. Torch-free."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from pretrain.errors import ConfigError, DataError, PretrainError
from pretrain.secrets import redact, secret_values


class Status(Enum):
    """ok; warn: training works, but; missing: training cannot start."""

    ok = "ok"
    warn = "warn"
    missing = "missing"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    status: Status
    subject: str
    detail: str
    remedy: str = ""
    error: type[PretrainError] = ConfigError
    """What a missing thing makes of the command."""


def show(findings: Iterable[Finding]) -> list[Finding]:
    """Print findings as they come, with their remedies, secrets masked; all of them in the end."""
    shown, secrets = [], secret_values(os.environ)
    for finding in findings:
        text = f"{finding.status.value:8}{finding.subject:13} {finding.detail}"
        if finding.remedy:
            text += f"\n{'':22}-> {finding.remedy}"
        print(redact(text, secrets), flush=True)
        shown.append(finding)
    return shown


def blocking(findings: Iterable[Finding]) -> list[Finding]:
    """Those with which training cannot start."""
    return [finding for finding in findings if finding.status is Status.missing]


def refuse_missing(findings: Sequence[Finding], who: str, run_name: str) -> None:
    """Raise ConfigError or DataError if something is missing; `who` cannot train the run then."""
    missing = blocking(findings)
    if missing:
        # what is wrong with the machine comes before what is wrong with the data
        errors = {finding.error for finding in missing}
        error = ConfigError if ConfigError in errors else DataError
        subjects = dict.fromkeys(finding.subject for finding in missing)
        raise error(
            f"{len(missing)} of {len(findings)} findings keep {who} from training {run_name}: "
            f"{', '.join(subjects)}."
        )
