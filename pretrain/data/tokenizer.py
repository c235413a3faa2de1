"""Text to token ids and back: what every tokenizer can do, the folder that keeps one, and the
command `pretrain data tokenizer`.

There are two kinds: SentencePiece, which we train, and a tokenizer.json that came with published
weights. `Tokenizer.load` tells them apart by tokenizer_info.json.
"""

import hashlib
import json
import os
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain import __version__
from pretrain.config import TrainConfig
from pretrain.data.special_ids import SpecialIds
from pretrain.errors import DataError

if TYPE_CHECKING:
    from pretrain.data.tokenizer_training import Sample

INFO_FILE = "tokenizer_info.json"
INFO_FORMAT = 1
SENTENCEPIECE = "sentencepiece"
ADOPTED = "adopted"
MAIN_FILES = {SENTENCEPIECE: "tokenizer.model", ADOPTED: "tokenizer.json"}
"""The file that decides the ids, by the kind of tokenizer."""


class Tokenizer(ABC):
    """A vocabulary and its rules; made by `Tokenizer.load`."""

    sha256: str
    """Of the file that decides the ids."""
    vocabulary_size: int
    """One more than the highest id."""
    special: SpecialIds
    special_names: dict[int, str]
    """How special ids are spelled."""
    reads_special: bool
    """Whether text that spells a special token is read as that token."""

    @staticmethod
    def load(path: str | Path) -> "Tokenizer":
        """The tokenizer of a folder.

        Raises DataError if files are missing or not those that were written.
        """
        # each kind imports this module, and whoever has one kind needs no library of the other
        folder = Path(path)
        main = read_main_file(folder)
        if kind_of(read_info(folder)) == ADOPTED:
            from pretrain.data.tokenizer_adopted import AdoptedTokenizer

            return AdoptedTokenizer(folder, main)
        from pretrain.data.tokenizer_sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer(main)

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Ids of each text, without any that frame it, on several threads (0: one per core).

        Raises DataError for lone surrogates, which UTF-8 cannot write.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special ids say nothing, bytes that are no UTF-8 become U+FFFD.

        Nor do ids beyond the vocabulary, which a model may have more of, and may choose.
        """

    @abstractmethod
    def export(self, folder: Path) -> dict[str, Any]:
        """Write what AutoTokenizer needs to give the same ids; the ids generation needs by name."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, as `encode_batch` gives them."""
        return self.encode_batch([text])[0]

    def generation_ids(self) -> dict[str, Any]:
        """What a Hugging Face generation configuration says of ids."""
        special = self.special
        return {
            "bos_token_id": special.begin_text,
            "eos_token_id": special.stops(),
            "pad_token_id": special.pad,
        }


def lone_surrogate(error: UnicodeEncodeError) -> DataError:
    """What is wrong with a text that UTF-8 cannot write."""
    return DataError(
        f"A text holds the lone surrogate {error.object[error.start]!r} at character {error.start} "
        f"of {error.object[:40]!r}...; UTF-8 cannot write it: replace it."
    )


def kind_of(info: dict[str, Any]) -> str:
    """Which kind of tokenizer a folder's information describes."""
    return str(info.get("kind", SENTENCEPIECE))


def read_main_file(folder: Path) -> bytes:
    """The file of a folder that decides the ids.

    Raises DataError if it is missing, or is not the one whose hash the folder states.
    """
    if not folder.is_dir():
        raise DataError(
            f"No tokenizer at {folder}: there is no such folder. Train one with "
            "`pretrain data tokenizer`, or set tokenizer.path to a folder that has one."
        )
    info = read_info(folder)
    path = folder / MAIN_FILES[kind_of(info)]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; copy the tokenizer again.") from error
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != info["sha256"]:
        raise DataError(
            f"{path} has sha256 {sha256[:16]}..., {INFO_FILE} says {str(info['sha256'])[:16]}...: "
            "it is damaged or another one; make the folder again, or copy it again."
        )
    return content


def read_info(path: str | Path) -> dict[str, Any]:
    """What is known of a tokenizer folder: its hash, special ids, and how it was made."""
    file = Path(path) / INFO_FILE
    try:
        info: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        remedy = "make the tokenizer again"
        if file.with_name(MAIN_FILES[ADOPTED]).is_file():
            remedy = (
                f"`pretrain adopt hf={path}` takes a {MAIN_FILES[ADOPTED]} over with its weights"
            )
        raise DataError(f"{file}: {error.strerror}; {remedy}.") from error
    except ValueError as error:
        raise DataError(f"{file} is damaged ({error}); make the tokenizer again.") from error
    if info.get("format") != INFO_FORMAT or kind_of(info) not in MAIN_FILES:
        raise DataError(
            f"{file} has format {info.get('format')}, kind {kind_of(info)}; this program reads "
            f"{INFO_FORMAT}, {' or '.join(MAIN_FILES)}. Make the tokenizer again."
        )
    return info


def describe(tokenizer: Tokenizer, kind: str) -> dict[str, Any]:
    """What every tokenizer_info.json says."""
    return {
        "format": INFO_FORMAT,
        "kind": kind,
        "sha256": tokenizer.sha256,
        "vocabulary_size": tokenizer.vocabulary_size,
        "special": tokenizer.special.known(),
    }


def write_folder(path: str | Path, files: dict[str, bytes], info: dict[str, Any]) -> None:
    """Write a tokenizer folder, which appears as a whole or not at all.

    Raises DataError if the folder is there already or cannot be written.
    """
    folder = Path(path)
    # processes of several nodes may write at once, and have the same number
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    content = {**files, INFO_FILE: json.dumps(info, indent=2, sort_keys=True).encode()}
    try:
        partial.mkdir(parents=True)
        for name, data in content.items():
            with open(partial / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        os.rename(partial, folder)
    except OSError as error:
        raise DataError(
            f"Cannot write the tokenizer to {folder}: {error.strerror}. Free space, remove what is "
            "there, or choose another tokenizer.path."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main(config: TrainConfig) -> None:
    """Train the tokenizer of a configuration, or say that it is there.

    Several jobs may do it at once: the first to finish counts, the others find it there. Raises
    DataError if tokenizer.path holds one that was trained with other settings.
    """
    # whoever only uses a tokenizer needs none of the readers of raw text
    from pretrain.data.tokenizer_sentencepiece import SentencePieceTokenizer
    from pretrain.data.tokenizer_training import train, training_settings

    folder = Path(config.tokenizer.path)
    settings = training_settings(config.tokenizer, config.data)
    if _is_taken(folder):
        _accept(folder, settings)
        return
    model, sample = train(config.tokenizer, config.data)
    tokenizer = SentencePieceTokenizer(model)
    info = describe(tokenizer, SENTENCEPIECE) | _describe_training(settings, sample)
    try:
        write_folder(folder, {MAIN_FILES[SENTENCEPIECE]: model}, info)
    except DataError:
        if not _is_taken(folder):
            raise
        _accept(folder, settings)
        return
    ratio = _bytes_per_token(tokenizer, sample.probe)
    print(
        f"tokenizer {folder}: {tokenizer.vocabulary_size} pieces from {sample.bytes / 1e6:.1f} MB "
        f"in {sample.documents} documents, {ratio:.2f} bytes per token"
    )


def _is_taken(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _accept(folder: Path, settings: dict[str, Any]) -> None:
    """Say that the tokenizer is there. Raises DataError if it is another one than asked for."""
    tokenizer, info = Tokenizer.load(folder), read_info(folder)
    is_adopted = "settings" not in info
    if not is_adopted:
        _check_settings(settings, info["settings"], folder)
    trained = "trained before; for other text choose another tokenizer.path or data.name"
    made = "adopted with the weights" if is_adopted else trained
    print(f"tokenizer {folder}: {tokenizer.vocabulary_size} pieces, {made}")


def _check_settings(wanted: dict[str, Any], found: dict[str, Any], folder: Path) -> None:
    differing = [
        f"{key}: {found.get(key)} there, {wanted.get(key)} now"
        for key in sorted(wanted.keys() | found.keys())
        if wanted.get(key) != found.get(key)
    ]
    if differing:
        raise DataError(
            f"The tokenizer in {folder} was trained with other settings:\n  "
            + "\n  ".join(differing)
            + "\n  Choose another tokenizer.path, or delete the folder to train it again; shards "
            "and runs that use it must then be made again."
        )


def _describe_training(settings: dict[str, Any], sample: "Sample") -> dict[str, Any]:
    return {
        "settings": settings,
        "corpus": {
            "fingerprint": sample.fingerprint,
            "documents": sample.documents,
            "source_bytes": sample.source_bytes,
        },
        "made_with": {"pretrain": __version__, "sentencepiece": version("sentencepiece")},
    }


def _bytes_per_token(tokenizer: Tokenizer, texts: list[str]) -> float:
    tokens = sum(map(len, tokenizer.encode_batch(texts)))
    return sum(len(text.encode()) for text in texts) / max(tokens, 1)
