"""Copies of remote shards on this node: whole, verified, within a size.

One process of the node downloads a shard, the others wait for it on a file lock, which the kernel
releases if that process dies. A copy appears under its name only after its sha256 was right.
"""

import fcntl
import hashlib
import http.client
import logging
import os
import random
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from errno import EDQUOT, ENOSPC
from pathlib import Path
from string import Template
from typing import Any, TypeVar

from pretrain.errors import (
    ConfigError,
    DamageError,
    DataError,
    PretrainError,
    UnreachableError,
)

log = logging.getLogger(__name__)

Content = TypeVar("Content")

ATTEMPTS = 5
RETRY_WAIT_S = 1.0
TIMEOUT_S = 60.0
CHUNK_BYTES = 1 << 20
STALE_S = 24 * 3600.0
# statuses below 500 that ask for another try: timeout, conflict, too early, too many requests
ASKED_AGAIN = (408, 409, 425, 429)


def is_url(location: str) -> bool:
    """Whether this is a URL, not a folder."""
    return "://" in location


def read_remote(url: str, *, retry_wait_s: float = RETRY_WAIT_S) -> bytes:
    """A small remote file. Raises DataError if it cannot be read."""
    return _try_often(url, lambda: b"".join(_chunks(url)), retry_wait_s)


class _WrongContentError(Exception):
    """What arrived is not what was asked for."""


def _try_often(url: str, attempt: Callable[[], Content], wait_s: float) -> Content:
    """What the first attempt gives that may succeed; waits grow from about `wait_s`.

    Raises DamageError if wrong content came, UnreachableError if none, and DataError at once for
    what will not pass.
    """
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except _WrongContentError as error:
            # what arrives but is wrong is damage; what does not arrive says nothing about the shard
            kind: type[DataError] = DamageError
            problem = str(error)
        except OSError as error:
            kind, problem = UnreachableError, f"{type(error).__name__}: {error}"
        log.warning("%s: %s (attempt %d of %d)", url, problem, number, ATTEMPTS)
        if number < ATTEMPTS:
            time.sleep(wait_s * 2 ** (number - 1) * random.SystemRandom().uniform(0.5, 1.5))
    raise kind(
        f"{url} could not be copied in {ATTEMPTS} attempts: {problem}. Check the network, this "
        "node's keys, and that the manifest belongs to these shards."
    )


def _chunks(url: str) -> Iterator[bytes]:
    """The content of a remote file. Raises OSError for what may pass, DataError for the rest."""
    try:
        with _open(url) as remote:
            while chunk := remote.read(CHUNK_BYTES):
                yield chunk
    except PretrainError:
        raise
    except Exception as error:
        if (lasting := _lasting(url, error)) is not None:
            raise lasting from error
        if isinstance(error, OSError):
            raise
        # http.client, aiohttp and botocore have errors of their own for a server that is away or
        # hangs up
        raise ConnectionError(f"{type(error).__name__}: {error}") from error


def _lasting(url: str, error: Exception) -> DataError | None:
    """What to say of an error that another try would only meet again; None if it may pass."""
    status, said = _answer(error)
    if status in (404, 410):
        return DamageError(f"{url} does not exist: the server says {said}; check data.shards.")
    if isinstance(error, FileNotFoundError):
        return DamageError(f"{url} does not exist; check data.shards.")
    # a client that can name the trouble does it by the error's type, whatever the status
    if status is not None and not isinstance(error, TimeoutError):
        if status >= 500 or status in ASKED_AGAIN:
            return None
        return DataError(
            f"{url}: the server says {said}; check data.shards, the keys that this node has, and "
            "whether they may read it."
        )
    if isinstance(error, PermissionError):
        return DataError(f"{url}: {error}; check whether this node may read it.")
    if type(error) is ValueError or isinstance(error, (http.client.InvalidURL, *_unusable())):
        return DataError(
            f"{url} cannot be asked for: {type(error).__name__}: {error}. Check data.shards and "
            "this node's settings for that store."
        )
    return None


def _answer(error: BaseException | None) -> tuple[int | None, str]:
    """Status and words of the server, from an error or what has caused it; None if it is mute."""
    while error is not None:
        if isinstance(error, urllib.error.HTTPError):
            return error.code, f"{error.code} {error.reason}"
        # of botocore's ClientError, which s3fs translates to an OSError
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            status = int(response["ResponseMetadata"]["HTTPStatusCode"])
            # an answer without a body has the status for a code
            code, message = (response["Error"].get(key, "") for key in ("Code", "Message"))
            words = message if code == str(status) else f"{code}: {message}"
            return status, f"{status} {words}"
        error = error.__cause__
    return None, ""


def _unusable() -> tuple[type[Exception], ...]:
    """S3's errors for names, profiles and regions with which there is nothing to ask.

    Not those for missing keys: where a node asks a service for them, they may come.
    """
    try:
        from botocore import exceptions as of_s3
    except ImportError:
        return ()
    return (
        of_s3.ConfigNotFound,
        of_s3.ConfigParseError,
        of_s3.InvalidRegionError,
        of_s3.NoRegionError,
        of_s3.ParamValidationError,
        of_s3.PartialCredentialsError,
        of_s3.ProfileNotFound,
        of_s3.UnknownEndpointError,
    )


@contextmanager
def _open(url: str) -> Iterator[Any]:
    if url.startswith(("http://", "https://")):
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            yield response
            if response.length:
                raise ConnectionError(f"the last {response.length} bytes did not come")
        return
    import fsspec

    try:
        opened = fsspec.open(url, "rb")
    except (ValueError, ImportError) as error:
        raise DataError(
            f"{url} cannot be opened: {error}. For object stores install pretrain[remote]."
        ) from error
    with opened as remote:
        yield remote


def folder_here(cache: str) -> Path:
    """The folder that `data.cache` means on this node.

    Expanded this late since the frozen configuration is made elsewhere, once for all nodes.
    TMPDIR is where this process may write temporary files, whether it is set or not. Raises
    ConfigError for another variable that is not set.
    """
    variables = {**os.environ, "TMPDIR": tempfile.gettempdir()}
    try:
        return Path(Template(cache).substitute(variables))
    except KeyError as error:
        raise ConfigError(
            f"data.cache={cache}: {error.args[0]} is not set on {os.uname().nodename}; set it "
            "there, or use $TMPDIR."
        ) from None
    except ValueError as error:
        raise ConfigError(f"data.cache={cache}: {error}; $ begins a name, $$ is a $.") from None


class ShardCache:
    """A folder of verified copies, the least recently used of which go first."""

    def __init__(
        self, folder: Path, capacity_bytes: int, *, retry_wait_s: float = RETRY_WAIT_S
    ) -> None:
        """Raises ConfigError if there can be no such folder."""
        self._folder = folder
        self._capacity_bytes = capacity_bytes
        self._retry_wait_s = retry_wait_s
        try:
            (folder / "locks").mkdir(parents=True, exist_ok=True)
            with self._locked("room"):
                pass
        except OSError as error:
            raise ConfigError(
                f"data.cache={folder}: {error.strerror} on {os.uname().nodename}; give a folder "
                "of that node's own disk, which can be written and has file locks."
            ) from error

    def fetch(self, url: str, *, sha256: str, size: int) -> Path:
        """Path of the local copy, downloaded if there is none.

        Raises DataError if the remote file is missing, keeps failing, is not the expected one,
        or does not fit.
        """
        path = self._path(url, sha256)
        # few locks shared by all shards, so that they need no clearing away
        with self._locked(path.name[:2]):
            # not asked first whether it is there: another shard may take its place at any moment
            with suppress(FileNotFoundError):
                os.utime(path)
                return path
            self._check_capacity(size)
            _try_often(
                url,
                lambda: self._download(url, path, sha256=sha256, size=size),
                self._retry_wait_s,
            )
        return path

    def forget(self, url: str, *, sha256: str) -> None:
        """Remove the copy, which turned out to be damaged; the next fetch makes another."""
        self._path(url, sha256).unlink(missing_ok=True)

    def _path(self, url: str, sha256: str) -> Path:
        key = hashlib.sha256(f"{url}\n{sha256}".encode()).hexdigest()
        return self._folder / f"{key}.tar"

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with open(self._folder / "locks" / name, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _check_capacity(self, size: int) -> None:
        if size > self._capacity_bytes:
            raise DataError(
                f"A shard has {size} bytes, data.cache_bytes={self._capacity_bytes} is smaller; "
                "raise it to some hundred shards, or copy the shards to a folder."
            )

    def _publish(self, temporary: Path, path: Path, size: int) -> None:
        """Remove the least recently used copies that are too many, and name the new one."""
        with self._locked("room"):
            # what downloads that were killed have left
            for partial in self._folder.glob("*.part"):
                # another process may publish or remove its own meanwhile
                with suppress(FileNotFoundError):
                    if time.time() - partial.stat().st_mtime > STALE_S:
                        partial.unlink()
            copies = []
            for copy in self._folder.glob("*.tar"):
                status = copy.stat()
                copies.append((status.st_mtime_ns, copy, status.st_size))
            excess = sum(copy[2] for copy in copies) + size - self._capacity_bytes
            for _, copy, freed in sorted(copies):
                if excess <= 0:
                    break
                # a reader that has it open keeps it; one that comes back fetches it again
                copy.unlink(missing_ok=True)
                excess -= freed
            os.replace(temporary, path)

    def _download(self, url: str, path: Path, *, sha256: str, size: int) -> None:
        """Raises _WrongContentError for another content, OSError for what may pass."""
        # named without a process id: under the lock there is one writer, and it starts anew
        temporary = path.with_suffix(".part")
        digest, received = hashlib.sha256(), 0
        try:
            with open(temporary, "wb") as output:
                for chunk in _chunks(url):
                    digest.update(chunk)
                    received += len(chunk)
                    output.write(chunk)
                output.flush()
                os.fsync(output.fileno())
            if received != size or digest.hexdigest() != sha256:
                raise _WrongContentError(
                    f"received {received} bytes with sha256 {digest.hexdigest()[:16]}..., "
                    f"the manifest says {size} with {sha256[:16]}..."
                )
            self._publish(temporary, path, size)
        except OSError as error:
            if error.errno in (ENOSPC, EDQUOT):
                free = shutil.disk_usage(self._folder).free
                raise DataError(
                    f"No space for {url} in data.cache={self._folder}: {size} bytes needed, {free} "
                    "free; lower data.cache_bytes below what the disk has, or choose another disk."
                ) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)
