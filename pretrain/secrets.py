"""Keeps secrets out of everything that a run writes: values of the environment, and of URLs."""

import logging
import os
import re
from collections.abc import Mapping
from urllib.parse import quote

MASK = "***"
# A shorter value is a word, and would be blotted out everywhere.
_LEAST_LENGTH = 8
_NAME = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)
_PLAIN_NAME = re.compile(r"_(file|path|dir)$", re.IGNORECASE)
_PASSWORD_NAME = re.compile(r"passw|secret", re.IGNORECASE)
# A lone name before the @ is a token over http, and a harmless user elsewhere (sftp, hdfs).
_USERINFO = re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)|(?<=http://|ttps://)[^/\s@]+(?=@)")
_SIGNATURE = re.compile(
    r"(?<=[?&])([\w-]*(?:signature|token|secret|passw(?:or)?d|api_?key|access_?key)=|sig=)"
    r"[^&\s'\"]+",
    re.IGNORECASE,
)


def secret_values(environ: Mapping[str, str]) -> list[str]:
    """Values of variables whose names speak of secrets, also as URLs spell them; longest first."""
    found = {
        spelling
        for name, value in environ.items()
        if _NAME.search(name) and len(value) >= _LEAST_LENGTH and not _is_plain(name, value)
        for spelling in (value, quote(value, safe=""))
    }
    return sorted(found, key=len, reverse=True)


def _is_plain(name: str, value: str) -> bool:
    """Places of files and counts are nobody's secret; AWS keys may begin with a slash, though."""
    if value.isdigit():
        return not _PASSWORD_NAME.search(name)
    if not value.startswith(("/", "~", ".")):
        return False
    return bool(_PLAIN_NAME.search(name)) or os.path.exists(os.path.expanduser(value))


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
