"""Text to token ids and back, exactly; and the command `pretrain data tokenizer`.

SentencePiece BPE with byte fallback. Any text without lone surrogates comes back as it was:
SentencePiece writes a space as U+2581 inside pieces, so a U+2581 of the text itself is encoded
as its three UTF-8 bytes, and ids are decoded through the bytes that each stands for.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sentencepiece

from pretrain import __version__
from pretrain.config import TrainConfig
from pretrain.data.special_ids import SpecialIds, special_ids, special_names
from pretrain.errors import DataError

if TYPE_CHECKING:
    from pretrain.data.tokenizer_training import Sample

MODEL_FILE = "tokenizer.model"
INFO_FILE = "tokenizer_info.json"
INFO_FORMAT = 1

SPACE_MARK = "\u2581"
# SentencePiece slows down on long strings: 5.9 MB/s at 4 kB, 1.9 MB/s at 4 MB.
CHUNK_CHARACTERS = 50_000


class Tokenizer:
    """A trained vocabulary; made by `Tokenizer.load`.

    `vocabulary_size` counts the special ids, `special` names them, `sha256` is the model file's.
    """

    def __init__(self, model: bytes) -> None:
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocabulary_size: int = self._processor.get_piece_size()
        self.special: SpecialIds = special_ids(self.vocabulary_size)
        first = self.special.begin_text
        names = [self._processor.id_to_piece(i) for i in range(first, self.vocabulary_size)]
        if names != special_names():
            raise DataError(
                f"The last {len(names)} pieces are not the special tokens: {names[:3]}... "
                "and not <|begin_text|>...; train it with `pretrain data tokenizer`."
            )
        self._bytes = [self._bytes_of(i) for i in range(self.vocabulary_size)]
        self._space_mark_ids = [
            self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()
        ]

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer of a folder.

        Raises DataError if files are missing or the model is not the one that was trained.
        """
        model, info = _read_model(Path(path)), read_info(path)
        sha256 = hashlib.sha256(model).hexdigest()
        if sha256 != info["sha256"]:
            raise DataError(
                f"{Path(path) / MODEL_FILE} has sha256 {sha256[:16]}..., {INFO_FILE} says "
                f"{str(info['sha256'])[:16]}...: it is damaged or another one; delete the folder "
                "and train it again, or copy it again."
            )
        return cls(model)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; never special ids, whatever the text spells.

        Texts beyond 50,000 characters are cut after line breaks, and no piece spans a cut.
        Raises DataError for lone surrogates, which UTF-8 cannot write.
        """
        segments = list(_segments(text))
        try:
            encoded = (self._processor.encode(segment.encode()) for segment in segments)
            return self._join(segments, encoded)
        except UnicodeEncodeError as error:
            raise _lone_surrogate(error) from error

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Ids of each text as `encode` gives them, on several threads (0: one per core)."""
        segments = [list(_segments(text)) for text in texts]
        try:
            flat = [segment.encode() for of_text in segments for segment in of_text]
        except UnicodeEncodeError as error:
            raise _lone_surrogate(error) from error
        threads = threads or os.cpu_count() or 1
        encoded = iter(self._processor.encode(flat, num_threads=threads))
        return [self._join(of_text, encoded) for of_text in segments]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special ids say nothing, bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self._bytes[i] for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that one id stands for; none for special ids."""
        return self._bytes[token]

    def _join(self, segments: list[str], encoded: Iterator[list[int]]) -> list[int]:
        ids: list[int] = []
        for segment in segments:
            pieces = next(encoded)
            ids += self._space_mark_ids if segment == SPACE_MARK else pieces
        return ids

    def _bytes_of(self, token: int) -> bytes:
        processor = self._processor
        if processor.is_byte(token):
            return bytes([int(processor.id_to_piece(token)[3:5], 16)])
        if processor.is_control(token) or processor.is_unknown(token):
            return b""
        return str(processor.id_to_piece(token)).replace(SPACE_MARK, " ").encode()


def _segments(text: str) -> Iterator[str]:
    """The text in order, cut so that each U+2581 stands alone and no segment is too long."""
    for i, part in enumerate(text.split(SPACE_MARK)):
        if i:
            yield SPACE_MARK
        start = 0
        while len(part) - start > CHUNK_CHARACTERS:
            line_end = part.rfind("\n", start, start + CHUNK_CHARACTERS) + 1
            end = line_end or start + CHUNK_CHARACTERS
            yield part[start:end]
            start = end
        yield part[start:]


def _lone_surrogate(error: UnicodeEncodeError) -> DataError:
    return DataError(
        f"A text holds the lone surrogate {error.object[error.start]!r} at character {error.start} "
        f"of {error.object[:40]!r}...; UTF-8 cannot write it: replace it."
    )


def _read_model(folder: Path) -> bytes:
    try:
        return (folder / MODEL_FILE).read_bytes()
    except OSError as error:
        raise DataError(
            f"No tokenizer at {folder}: {error.strerror} ({MODEL_FILE}). Train one with "
            "`pretrain data tokenizer`, or set tokenizer.path to a folder that has one."
        ) from error


def read_info(path: str | Path) -> dict[str, Any]:
    """What is known of a tokenizer folder: its hash, special ids, and how it was trained."""
    file = Path(path) / INFO_FILE
    try:
        info: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; train the tokenizer again.") from error
    except ValueError as error:
        raise DataError(f"{file} is damaged ({error}); train the tokenizer again.") from error
    if info.get("format") != INFO_FORMAT:
        raise DataError(
            f"{file} has format {info.get('format')}; this program reads {INFO_FORMAT}. "
            "Train the tokenizer again."
        )
    return info


def write_folder(path: str | Path, model: bytes, info: dict[str, Any]) -> None:
    """Write a tokenizer folder, which appears as a whole or not at all.

    `info` says how it was made; hash, size and special ids are added to it.
    Raises DataError if the folder is there already or cannot be written.
    """
    folder = Path(path)
    tokenizer = Tokenizer(model)
    known = {
        "format": INFO_FORMAT,
        "sha256": tokenizer.sha256,
        "vocabulary_size": tokenizer.vocabulary_size,
        "special": tokenizer.special._asdict(),
    }
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        _write(partial / MODEL_FILE, model)
        _write(partial / INFO_FILE, json.dumps(known | info, indent=2, sort_keys=True).encode())
        os.rename(partial, folder)
    except OSError as error:
        raise DataError(
            f"Cannot write the tokenizer to {folder}: {error.strerror}. Free space, remove what is "
            "there, or choose another tokenizer.path."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def main(config: TrainConfig) -> None:
    """Train the tokenizer of a configuration, or say that it is there.

    Raises DataError if tokenizer.path holds one that was trained with other settings.
    """
    # whoever only uses a tokenizer needs none of the readers of raw text
    from pretrain.data.tokenizer_training import train, training_settings

    folder = Path(config.tokenizer.path)
    settings = training_settings(config.tokenizer, config.data)
    if folder.is_dir() and any(folder.iterdir()):
        tokenizer = Tokenizer.load(folder)
        _check_settings(settings, read_info(folder)["settings"], folder)
        print(f"tokenizer {folder}: {tokenizer.vocabulary_size} pieces, trained before")
        return
    model, sample = train(config.tokenizer, config.data)
    write_folder(folder, model, _describe(settings, sample))
    tokenizer = Tokenizer.load(folder)
    ratio = _bytes_per_token(tokenizer, sample.probe)
    print(
        f"tokenizer {folder}: {tokenizer.vocabulary_size} pieces from {sample.bytes / 1e6:.1f} MB "
        f"in {sample.documents} documents, {ratio:.2f} bytes per token"
    )


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


def _describe(settings: dict[str, Any], sample: "Sample") -> dict[str, Any]:
    return {
        "settings": settings,
        "corpus": {
            "fingerprint": sample.fingerprint,
            "documents": sample.documents,
            "source_bytes": sample.source_bytes,
        },
        "made_with": {"pretrain": __version__, "sentencepiece": sentencepiece.__version__},
    }


def _bytes_per_token(tokenizer: Tokenizer, texts: list[str]) -> float:
    tokens = sum(map(len, tokenizer.encode_batch(texts)))
    return sum(len(text.encode()) for text in texts) / max(tokens, 1)
