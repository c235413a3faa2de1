"""The shards of a configuration, opened: their manifest, their order, and readers of their rows."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

from pretrain.data.cache import ShardCache, is_url, read_remote
from pretrain.data.config import DataConfig
from pretrain.data.manifest import MANIFEST_FILE, Manifest, ShardManifest, read_manifest
from pretrain.data.mixture import PERIOD
from pretrain.data.order import Order
from pretrain.data.shards import RowBytes, ShardReader
from pretrain.errors import ConfigError, DataError

log = logging.getLogger(__name__)

# half of the usual limit of 1,024 descriptors of a process
OPEN_SHARDS = 512


def open_manifest(config: DataConfig) -> Manifest:
    """The manifest of data.shards.

    Raises DataError if there is none, it is damaged, or its rows are for another context.
    """
    if is_url(config.shards):
        url = f"{config.shards.rstrip('/')}/{MANIFEST_FILE}"
        try:
            content = read_remote(url)
        except OSError as error:
            raise DataError(f"{url} cannot be read: {error}. Check the network.") from error
        manifest = Manifest.from_bytes(content, url)
    else:
        manifest = read_manifest(Path(config.shards))
    if manifest.context != config.context:
        raise DataError(
            f"The shards at {config.shards} have rows for context {manifest.context}, "
            f"data.context={config.context}; build shards for it under another data.shards, or set "
            f"the model's context to {manifest.context}."
        )
    return manifest


def check_tokenizer(
    manifest: Manifest, *, vocabulary_size: int, tokenizer_sha256: str | None = None
) -> None:
    """Refuse shards whose ids a model cannot embed, or that another tokenizer made.

    `vocabulary_size` is the model's; `tokenizer_sha256` that of the tokenizer at hand, if any.
    """
    made_by = manifest.tokenizer
    if made_by.vocabulary_size > vocabulary_size:
        raise DataError(
            f"The shards have ids up to {made_by.vocabulary_size - 1} (a vocabulary of "
            f"{made_by.vocabulary_size}), model.vocabulary_size={vocabulary_size} is smaller; "
            "raise it, or build the shards with the tokenizer of this model."
        )
    if tokenizer_sha256 is not None and made_by.sha256 != tokenizer_sha256:
        raise DataError(
            f"The shards were made by a tokenizer with sha256 {made_by.sha256[:16]}..., the one at "
            f"hand has {tokenizer_sha256[:16]}...; point tokenizer.path at the first, or build the "
            "shards again under another data.shards."
        )


def source_weights(config: DataConfig, manifest: Manifest) -> dict[str, float]:
    """The share of each source of the shards: as configured, else as built, else by its tokens.

    Raises ConfigError if configuration and shards name other sources.
    """
    built = {source.name: source for source in manifest.sources}
    if config.sources and set(config.sources) != set(built):
        unknown, unnamed = set(config.sources) - set(built), set(built) - set(config.sources)
        raise ConfigError(
            f"data.sources and the shards at {config.shards} differ: "
            f"only configured: {sorted(unknown) or 'none'}, only built: "
            f"{sorted(unnamed) or 'none'}. Give a source that is not to be read the weight 0."
        )
    weights = {
        name: config.sources[name].weight if config.sources else source.weight
        for name, source in built.items()
    }
    tokens = {name: float(source.totals("train").tokens) for name, source in built.items()}
    return {name: tokens[name] if weight is None else weight for name, weight in weights.items()}


def train_order(config: DataConfig, manifest: Manifest, seed: int) -> Order:
    """The order in which a run reads the train split. Raises DataError for an empty source."""
    weights = source_weights(config, manifest)
    for source in manifest.sources:
        if weights[source.name] > 0 and not source.train:
            raise DataError(
                f"Source {source.name} has the weight {weights[source.name]} but no train rows; "
                "give it the weight 0, or give it text and build again."
            )
    order = Order(
        {source.name: [shard.rows for shard in source.train] for source in manifest.sources},
        list(weights.values()),
        seed=seed,
        window_shards=config.window_shards,
    )
    _warn_of_lifted(weights, order.mixture.shares)
    return order


def _warn_of_lifted(weights: dict[str, float], shares: list[int]) -> None:
    """Name the sources that are too small for the mixture's period and are read more often."""
    total = sum(weights.values())
    for (name, weight), share in zip(weights.items(), shares, strict=True):
        wanted = weight / total * PERIOD
        if share > 2 * wanted:
            log.warning(
                "Source %s has %.2g %% of the weights, but gets %d row in %d: %.2g times as much; "
                "give it the weight 0, or make it part of another source.",
                name,
                100 * weight / total,
                share,
                PERIOD,
                share / wanted,
            )


class ShardStore:
    """Rows of one split by source and shard number, from a folder or through the node's cache."""

    def __init__(self, config: DataConfig, manifest: Manifest, split: str) -> None:
        self._manifest = manifest
        self._shards: Sequence[Sequence[ShardManifest]] = [
            source.split(split) for source in manifest.sources
        ]
        self._location = config.shards.rstrip("/")
        self._cache: ShardCache | None = None
        if is_url(self._location):
            if not config.cache:
                raise ConfigError(
                    f"data.shards={config.shards} is a URL; set data.cache to a folder on this "
                    "node's own disk for copies of its shards."
                )
            self._cache = ShardCache(Path(config.cache), config.cache_bytes)
        # all that were touched keep what they have verified; the last ones keep their file open
        self._readers: dict[tuple[int, int], ShardReader] = {}
        self._open: OrderedDict[tuple[int, int], ShardReader] = OrderedDict()

    def read(self, source: int, shard: int, row: int) -> RowBytes:
        """One row. Raises DataError if its shard is missing or damaged."""
        place = (source, shard)
        if place not in self._readers:
            self._readers[place] = self.reader(source, shard)
        reader = self._open[place] = self._readers[place]
        self._open.move_to_end(place)
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        return reader.read(row)

    def reader(self, source: int, shard: int) -> ShardReader:
        """A reader of its own for one shard."""
        entry = self._shards[source][shard]
        return ShardReader(self._manifest, entry, self._finder(entry))

    def name(self, source: int, shard: int) -> str:
        """The shard's path below data.shards."""
        return self._shards[source][shard].name

    def close(self) -> None:
        """Give all file descriptors back."""
        for reader in self._open.values():
            reader.close()
        self._open.clear()

    def _finder(self, shard: ShardManifest) -> Callable[[], Path]:
        location = f"{self._location}/{shard.name}"
        cache = self._cache
        if cache is None:
            return lambda: Path(location)
        return lambda: cache.fetch(location, sha256=shard.sha256, size=shard.bytes)
