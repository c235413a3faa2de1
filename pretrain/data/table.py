"""The manifest as a person reads it."""

from rich.console import Console
from rich.table import Table

from pretrain.data.manifest import SPLITS, Manifest


def print_manifest(manifest: Manifest, location: str) -> None:
    """Print the sources and splits of a folder of shards, and its fingerprint."""
    table = Table(title=f"Shards at {location}", title_justify="left")
    table.add_column("source")
    for name in ("split", "documents", "rows", "tokens", "padding", "shards", "MB"):
        table.add_column(name, justify="right")
    for source in manifest.sources:
        for split in SPLITS:
            totals = source.totals(split)
            stored = totals.tokens + totals.padding
            table.add_row(
                source.name,
                split,
                f"{totals.documents:,}",
                f"{totals.rows:,}",
                f"{totals.tokens:,}",
                f"{totals.padding / stored:.2%}" if stored else "-",
                str(totals.shards),
                f"{totals.bytes / 1e6:.1f}",
            )
    console = Console()
    console.print(table)
    tokens = sum(source.totals("train").tokens for source in manifest.sources)
    console.print(
        f"{tokens:,} tokens to train on, context {manifest.context}, {manifest.dtype}, "
        f"vocabulary {manifest.tokenizer.vocabulary_size}, fingerprint {manifest.fingerprint[:16]}",
        highlight=False,
        soft_wrap=True,
    )
