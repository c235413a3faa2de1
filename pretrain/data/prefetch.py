"""Downloads the shards of the rows to come while the rows before them are trained on."""

import logging
import threading
from collections import deque
from types import TracebackType

import numpy as np
import numpy.typing as npt

from pretrain.data.store import ShardStore
from pretrain.errors import DataError

log = logging.getLogger(__name__)


class Prefetch:
    """A thread that brings remote shards into the node's cache in the order of their first use.

    What cannot be had is left to the reader, which says so. Shards in folders need none of this.
    """

    def __init__(self, store: ShardStore) -> None:
        self._store = store
        self._wanted: deque[tuple[int, int]] = deque()
        self._at_hand: dict[tuple[int, int], None] = {}
        self._has_work = threading.Condition()
        self._is_over = False

    def __enter__(self) -> "Prefetch":
        if self._store.is_remote:
            threading.Thread(target=self._fetch_all, name="prefetch", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._has_work:
            self._is_over = True
            self._has_work.notify()

    def want(self, addresses: npt.NDArray[np.int64]) -> None:
        """Rows to come after those of the last call, [rows, 4]: source, epoch, shard, row.

        Called by whoever reads the rows: files that neither need are closed.
        """
        if not self._store.is_remote:
            return
        shards = dict.fromkeys((source, shard) for source, _, shard, _ in addresses.tolist())
        self._store.close_all_but(self._at_hand.keys() | shards.keys())
        self._at_hand = shards
        with self._has_work:
            self._wanted.extend(shards)
            self._has_work.notify()

    def _fetch_all(self) -> None:
        while True:
            with self._has_work:
                self._has_work.wait_for(lambda: self._is_over or self._wanted)
                if self._is_over:
                    return
                source, shard = self._wanted.popleft()
            try:
                self._store.fetch(source, shard)
            except (DataError, OSError) as error:
                log.debug("not prefetched: %s", error)
