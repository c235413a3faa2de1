"""Shards that are there already: are they the ones that the configuration asks for, and whole?"""

import json
import logging
from pathlib import Path
from typing import Any

from pretrain.data.config import Corpus, DataConfig
from pretrain.data.manifest import Manifest, read_manifest
from pretrain.data.sources import Part, find_parts
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import DataError

log = logging.getLogger(__name__)

INPUTS_FILE = "inputs.json"

Parts = dict[str, list[Part]]


def build_settings(config: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """All that decides the bytes beside the text itself, by the name a user knows."""
    settings: dict[str, Any] = {
        f"data.{name}": getattr(config, name)
        for name in (
            "context",
            "rows_per_member",
            "members_per_shard",
            "pack_tokens",
            "valid_fraction",
            "max_bytes",
            "text_key",
        )
    }
    settings["data.corpus"] = config.corpus.value
    if config.max_digits is not None:
        settings["data.max_digits"] = config.max_digits
        settings["data.digit_order"] = config.digit_order.value
    settings["tokenizer.sha256"] = tokenizer.sha256
    if config.valid_paths:
        # left out if empty: shards that were built before it existed have the same settings
        settings["data.valid_paths"] = list(config.valid_paths)
    for name, source in sorted(config.sources.items()):
        settings[f"data.sources.{name}.paths"] = list(source.paths)
        settings[f"data.sources.{name}.text_key"] = source.text_key
    return settings


def list_inputs(parts: Parts) -> dict[str, dict[str, int]]:
    """Bytes of the parts' files, by source and path."""
    return {source: {part.path: part.stored_bytes for part in own} for source, own in parts.items()}


def reuse(config: DataConfig, settings: dict[str, Any], folder: Path) -> Manifest:
    """The finished shards of the folder. Raises DataError if they are others, or not whole."""
    manifest = read_manifest(folder)
    remedy = f"Choose another data.shards (or data.name), or remove {folder} to build again there."
    differing = [
        f"{key}: built with {manifest.settings.get(key)!r}, now {settings.get(key)!r}"
        for key in sorted(settings.keys() | manifest.settings.keys())
        if manifest.settings.get(key) != settings.get(key)
    ]
    if differing:
        raise DataError(
            f"{folder} holds shards of other settings:\n  " + "\n  ".join(differing) + f"\n{remedy}"
        )
    for source in manifest.sources:
        for shard in source.train + source.valid:
            path = folder / shard.name
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes:
                there = "is missing" if size is None else f"has {size} bytes"
                raise DataError(
                    f"{path} {there}, the manifest says {shard.bytes} bytes. Copy it again, or "
                    f"remove {folder} to build again."
                )
    _check_inputs(config, folder, remedy)
    log.info("the shards at %s are finished; nothing to build", folder)
    return manifest


def _check_inputs(config: DataConfig, folder: Path, remedy: str) -> None:
    """Compare the raw text with what was built, if it is still there."""
    try:
        now = list_inputs(find_parts(config))
        built = json.loads((folder / INPUTS_FILE).read_bytes())
    except (DataError, OSError, ValueError) as error:
        log.warning("not compared with the raw text, using the shards as built: %s", error)
        return
    changed = [
        f"{source}/{path}"
        for source in sorted(now.keys() | built.keys())
        for path in sorted(now.get(source, {}).keys() | built.get(source, {}).keys())
        if now.get(source, {}).get(path, -1) != built.get(source, {}).get(path, -1)
    ]
    if not changed:
        return
    told = (
        f"{len(changed)} files of the raw text are new, gone or of another size since {folder} was "
        f"built, among them {changed[0]}."
    )
    if config.corpus is Corpus.embedded:
        # it changes with every package that is installed; the shards are still good
        log.warning("%s The shards are used as built. %s", told, remedy)
    else:
        raise DataError(f"{told} {remedy}")
