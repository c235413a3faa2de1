"""The command `pretrain data inspect`: what a run will read, and one row of it as text."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pretrain.config import InspectTrainConfig
from pretrain.data.manifest import Manifest
from pretrain.data.order import Order
from pretrain.data.shards import RowBytes
from pretrain.data.store import ShardStore, check_tokenizer, open_manifest, train_order
from pretrain.data.table import print_manifest
from pretrain.data.tokenizer import Tokenizer
from pretrain.jobs.progress import newest_state
from pretrain.loop.state import total_rows


def main(config: InspectTrainConfig) -> None:
    """Print the shards, the mixture of the run, and its global row config.inspect.row."""
    manifest = open_manifest(config.data)
    tokenizer = Tokenizer.load(config.tokenizer.path)
    check_tokenizer(
        manifest,
        vocabulary_size=config.model.vocabulary_size,
        tokenizer_sha256=tokenizer.sha256,
    )
    order = train_order(config.data, manifest, config.run.seed)
    print_manifest(manifest, config.data.shards)
    # a run that is under way may have had steps of another size
    state = newest_state(Path(config.run.dir), fingerprint=manifest.fingerprint)
    console = Console()
    console.print(mixture_table(manifest, order, total_rows(config, state), read=state.rows))
    address = order.address(config.inspect.row)
    store = ShardStore(config.data, manifest, "train")
    stored = store.read(address.source, address.shard, address.row)
    member, inside = divmod(address.row, manifest.rows_per_member)
    console.print(
        f"Row {config.inspect.row}: {store.name(address.source, address.shard)}, member "
        f"{member:06d}, row {inside}, epoch {address.epoch}",
        highlight=False,
    )
    for heading, text in row_documents(manifest, tokenizer, stored):
        console.rule(heading, align="left")
        console.print(escape(text), highlight=False, soft_wrap=True)
    store.close()


def mixture_table(manifest: Manifest, order: Order, rows: int, *, read: int = 0) -> Table:
    """What a run of so many rows reads of each source, and how often over; `read`: rows so far."""
    so_far = f", {read:,} of them so far" if read else ""
    table = Table(title=f"Mixture of {rows:,} rows{so_far}", title_justify="left")
    table.add_column("source")
    for name in ("share", "rows", "rows there are", "epochs"):
        table.add_column(name, justify="right")
    counts, epochs = order.mixture.counts(rows).tolist(), order.epochs(rows)
    for source, taken, over in zip(manifest.sources, counts, epochs, strict=True):
        held = source.totals("train").rows
        table.add_row(
            source.name,
            f"{taken / max(rows, 1):.2%}",
            f"{taken:,}",
            f"{held:,}",
            f"{over:.3f}" if held else "-",
        )
    return table


def row_documents(
    manifest: Manifest, tokenizer: Tokenizer, stored: RowBytes
) -> Iterator[tuple[str, str]]:
    """A heading and the text of each document, or piece of one, in a row."""
    tokens = np.frombuffer(stored.tokens, dtype=manifest.dtype)
    lengths = np.frombuffer(stored.lengths, dtype=np.uint32)
    special = tokenizer.special
    at = 0
    for number, length in enumerate(lengths[lengths > 0].tolist()):
        ids = tokens[at : at + length].tolist()
        at += length
        begins, ends = ids[0] == special.begin_text, ids[-1] == special.end_text
        parts = "whole" if begins and ends else "begins" if begins else "ends" if ends else "inside"
        yield f"document {number}: {length} tokens, {parts}", spell(tokenizer, ids)
    if at < len(tokens):
        yield f"padding: {len(tokens) - at} tokens", ""


def spell(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of ids with special ones by name."""
    names = tokenizer.special_names
    return "".join(
        "".join(names[i] for i in group) if is_special else tokenizer.decode(list(group))
        for is_special, group in groupby(ids, key=names.__contains__)
    )
