"""The shards of a configuration, opened: their manifest, their order, and readers of their rows."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from urllib.parse import quote

from pretrain.data.cache import ShardCache, folder_here, is_url, read_remote
from pretrain.data.config import DataConfig, OnDamage
from pretrain.data.manifest import MANIFEST_FILE, Manifest, ShardManifest, read_manifest
from pretrain.data.mixture import PERIOD
from pretrain.data.order import Order
from pretrain.data.shards import RowBytes, ShardReader
from pretrain.errors import ConfigError, DamageError, DataError

log = logging.getLogger(__name__)

# half of the usual limit of 1,024 descriptors of a process
OPEN_SHARDS = 512


def open_manifest(config: DataConfig) -> Manifest:
    """The manifest of data.shards.

    Raises DataError if there is none, it is damaged, or its rows are for another context.
    """
    if is_url(config.shards):
        url = f"{config.shards.rstrip('/')}/{MANIFEST_FILE}"
        manifest = Manifest.from_bytes(read_remote(url), url)
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
        corpus = manifest.settings.get("data.corpus", config.corpus.value)
        remedy = "Give a source that is not to be read the weight 0."
        if corpus != config.corpus.value:
            remedy = (
                f"They were built with data.corpus={corpus}, and it is {config.corpus.value} here: "
                "choose the same data=..., or another data.name."
            )
        raise ConfigError(
            f"data.sources and the shards at {config.shards} differ: "
            f"only configured: {sorted(unknown) or 'none'}, only built: "
            f"{sorted(unnamed) or 'none'}. {remedy}"
        )
    weights = {
        name: config.sources[name].weight if config.sources else source.weight
        for name, source in built.items()
    }
    tokens = {name: float(source.totals("train").tokens) for name, source in built.items()}
    return {name: tokens[name] if weight is None else weight for name, weight in weights.items()}


def train_order(config: DataConfig, manifest: Manifest, seed: int) -> Order:
    """The order in which a run reads the train split.

    Raises DataError for a source without rows, ConfigError for milestones of other sources.
    """
    weights = source_weights(config, manifest)
    phases = [(0, weights), *_milestones(config, list(weights))]
    for source in manifest.sources:
        largest = max(of_phase[source.name] for _, of_phase in phases)
        if largest > 0 and not source.train:
            raise DataError(
                f"Source {source.name} has the weight {largest} but no train rows; "
                "give it the weight 0, or give it text and build again."
            )
    order = Order(
        {source.name: [shard.rows for shard in source.train] for source in manifest.sources},
        list(weights.values()),
        seed=seed,
        window_shards=config.window_shards,
        milestones=[(row, list(of_phase.values())) for row, of_phase in phases[1:]],
    )
    for (_, of_phase), (_, mixture) in zip(phases, order.mixture.phases, strict=True):
        _warn_of_lifted(of_phase, mixture.shares)
    return order


def _milestones(config: DataConfig, names: list[str]) -> list[tuple[int, dict[str, float]]]:
    """First global row and weights of each milestone, in the order of the sources."""
    found = []
    for milestone in config.milestones:
        if set(milestone.weights) != set(names):
            raise ConfigError(
                f"data.milestones from {milestone.from_tokens:,} tokens on gives weights to "
                f"{', '.join(sorted(milestone.weights))}; the shards have {', '.join(names)}. Name "
                "each of them, with the weight 0 if it is not to be read."
            )
        row = milestone.first_row(config.context)
        found.append((row, {name: milestone.weights[name] for name in names}))
    return found


# Repeated text teaches almost as much as new text up to here (arXiv 2305.16264).
_USUAL_EPOCHS = 4.0


def check_epochs(
    config: DataConfig, order: Order, rows: int, *, without: Sequence[tuple[int, int]] = ()
) -> None:
    """Refuse a run of so many rows that would read a source more often than it may.

    `without`: stretches of rows that it went past, and does not learn from.
    Raises ConfigError; warns of sources that are read often and have no limit.
    """
    read = rows - sum(behind - first for first, behind in without)
    for source, epochs in zip(order.sources, order.epochs(rows, without=without), strict=True):
        configured = config.sources.get(source.name)
        limit = None if configured is None else configured.max_epochs
        if limit is not None and epochs > limit:
            raise ConfigError(
                f"data.sources.{source.name}.max_epochs={limit:g}, but {read:,} rows of this "
                f"mixture read its {source.rows:,} rows {epochs:.2f} times. Give "
                "it a smaller weight, or more text, or shorten the run."
            )
        if limit is None and epochs > _USUAL_EPOCHS:
            log.warning(
                "source %s will be read %.1f times; set data.sources.%s.max_epochs to have a limit",
                source.name,
                epochs,
                source.name,
            )


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
            self._cache = ShardCache(folder_here(config.cache), config.cache_bytes)
            self._warn_of_thrashing(config)
        # all that were touched keep what they have verified; the last ones keep their file open
        self._readers: dict[tuple[int, int], ShardReader] = {}
        self._open: OrderedDict[tuple[int, int], ShardReader] = OrderedDict()
        self._quarantines = config.on_damage is OnDamage.quarantine
        self._damage: dict[tuple[int, int, int], str] = {}
        # remote shards that are damaged where they come from: asked for once
        self._unfit: dict[str, str] = {}

    def read_or_quarantine(self, source: int, shard: int, row: int) -> RowBytes | str:
        """One row; with data.on_damage=quarantine the name of its member if that is damaged.

        All rows of the member are lost then, on whichever rank and in whichever order they are
        read. A member is warned of once.
        """
        member = row // self._manifest.rows_per_member
        place = (source, shard, member)
        if place not in self._damage:
            try:
                return self.read(source, shard, row)
            except DamageError as error:
                if not self._quarantines:
                    raise
                self._damage[place] = f"{self.name(source, shard)}/{member:06d}"
                log.warning("quarantine of %s: %s", self._damage[place], error)
        return self._damage[place]

    def fetch(self, source: int, shard: int) -> None:
        """Bring a remote shard into the cache, if it is not there. Raises DataError."""
        self._finder(self._shards[source][shard])()

    @property
    def is_remote(self) -> bool:
        """Whether shards come through the node's cache."""
        return self._cache is not None

    def read(self, source: int, shard: int, row: int) -> RowBytes:
        """One row. Raises DamageError if its shard is missing or damaged."""
        place = (source, shard)
        if place not in self._readers:
            self._readers[place] = self.reader(source, shard)
        reader = self._open[place] = self._readers[place]
        self._open.move_to_end(place)
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        try:
            return reader.read(row)
        except DamageError as error:
            location = self._location_of(reader.shard)
            if self._cache is None or location in self._unfit:
                raise
            log.warning("%s The copy on this node is removed and made again.", error)
            reader.close()
            self._cache.forget(location, sha256=reader.shard.sha256)
            return reader.read(row)

    def reader(self, source: int, shard: int) -> ShardReader:
        """A reader of its own for one shard."""
        entry = self._shards[source][shard]
        return ShardReader(self._manifest, entry, self._finder(entry))

    def name(self, source: int, shard: int) -> str:
        """The shard's path below data.shards."""
        return self._shards[source][shard].name

    def _warn_of_thrashing(self, config: DataConfig) -> None:
        """A window that does not fit is downloaded again and again."""
        needed = sum(
            sum(sorted((shard.bytes for shard in shards), reverse=True)[: config.window_shards])
            for shards in self._shards
        )
        if needed > config.cache_bytes:
            log.warning(
                "data.cache_bytes=%s cannot hold the windows that are read together (%s bytes: "
                "data.window_shards=%d of each source), so shards will be downloaded more than "
                "once; raise it, or lower data.window_shards.",
                f"{config.cache_bytes:,}",
                f"{needed:,}",
                config.window_shards,
            )

    def close_all_but(self, kept: Set[tuple[int, int]]) -> None:
        """Give the file descriptors of all shards but these back; the next read opens again.

        A copy that leaves the cache takes its room on the disk as long as somebody has it open.
        """
        for place in self._open.keys() - kept:
            self._open.pop(place).close()

    def close(self) -> None:
        """Give all file descriptors back."""
        self.close_all_but(frozenset())

    def _finder(self, shard: ShardManifest) -> Callable[[], Path]:
        if self._cache is None:
            return lambda: Path(self._location_of(shard))
        return lambda: self._copy(shard)

    def _copy(self, shard: ShardManifest) -> Path:
        assert self._cache is not None
        location = self._location_of(shard)
        if location in self._unfit:
            raise DamageError(self._unfit[location])
        try:
            return self._cache.fetch(location, sha256=shard.sha256, size=shard.bytes)
        except DamageError as error:
            self._unfit[location] = str(error)
            raise

    def _location_of(self, shard: ShardManifest) -> str:
        # the name of a source may hold spaces, #, % or letters that a URL has to escape
        is_web = self._location.startswith(("http://", "https://"))
        return f"{self._location}/{quote(shard.name) if is_web else shard.name}"
