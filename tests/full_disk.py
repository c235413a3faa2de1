"""A disk that takes no more, for processes that are started meanwhile."""

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def small_files(limit_bytes: int) -> Iterator[None]:
    """No process that begins inside can make a file larger than this: writes fail with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
