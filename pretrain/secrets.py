"""Keeps secrets out of everything that a run writes: values of the environment, and of URLs."""

import logging
import os
import re
from collections.abc import Mapping

MASK = "***"
# A shorter value is a word, and would be blotted out everywhere.
_LEAST_LENGTH = 8
_NAME = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)
_USERINFO = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
_SIGNATURE = re.compile(
    r"(?<=[?&])((?:x-amz-signature|x-amz-security-token|x-goog-signature|signature|sig|token|"
    r"api_?key|access_?key)=)[^&\s'\"]+",
    re.IGNORECASE,
)


def secret_values(environ: Mapping[str, str]) -> list[str]:
    """Values of variables whose names speak of secrets, longest first."""
    found = {
        value
        for name, value in environ.items()
        if _NAME.search(name) and len(value) >= _LEAST_LENGTH and not _is_plain(value)
    }
    return sorted(found, key=len, reverse=True)


def _is_plain(value: str) -> bool:
    """Paths, numbers and switches are nobody's secret (SSH_KEY_FILE, NUM_TOKENS)."""
    return value.startswith(("/", "~", ".")) or value.isdigit()


def redact(text: str, values: list[str]) -> str:
    """The text with `values`, and passwords and signatures inside URLs, masked."""
    for value in values:
        text = text.replace(value, MASK)
    return _SIGNATURE.sub(rf"\1{MASK}", _USERINFO.sub(MASK, text))


def has_secret(text: str, values: list[str]) -> bool:
    """Whether redaction would change it."""
    return redact(text, values) != text


class Redacting(logging.Formatter):
    """A formatter whose lines, tracebacks included, hold no secrets of the environment."""

    def __init__(self, pattern: str) -> None:
        super().__init__(pattern)
        self._values = secret_values(os.environ)

    def format(self, record: logging.LogRecord) -> str:
        """The line, masked."""
        return redact(super().format(record), self._values)
