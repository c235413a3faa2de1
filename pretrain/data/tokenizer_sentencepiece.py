"""The tokenizer that we train: SentencePiece BPE with byte fallback, exact in both directions.

Any text without lone surrogates comes back as it was: SentencePiece writes a space as U+2581
inside pieces, so a U+2581 of the text itself is encoded as its three UTF-8 bytes, and ids are
decoded through the bytes that each stands for.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from pretrain.data.special_ids import special_ids, special_names
from pretrain.data.tokenizer import Tokenizer, lone_surrogate
from pretrain.errors import DataError

SPACE_MARK = "\u2581"
# SentencePiece slows down on long strings: 5.9 MB/s at 4 kB, 1.9 MB/s at 4 MB.
CHUNK_CHARACTERS = 50_000


class SentencePieceTokenizer(Tokenizer):
    """A trained SentencePiece model, with our special ids at its top."""

    # text that spells special tokens stays text
    reads_special = False

    def __init__(self, model: bytes) -> None:
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocabulary_size = self._processor.get_piece_size()
        self.special = special_ids(self.vocabulary_size)
        first = self.special.begin_text
        names = {i: self._processor.id_to_piece(i) for i in range(first, self.vocabulary_size)}
        if list(names.values()) != special_names():
            raise DataError(
                f"The last {len(names)} pieces are not the special tokens: "
                f"{list(names.values())[:3]}... and not <|begin_text|>...; train it with "
                "`pretrain data tokenizer`."
            )
        self.special_names = names
        self._bytes = [self._bytes_of(i) for i in range(self.vocabulary_size)]
        self._space_mark_ids = [
            self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()
        ]

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Ids of each text; never special ids, whatever the text spells.

        Texts beyond 50,000 characters are cut after line breaks, and no piece spans a cut.
        """
        segments = [list(_segments(text)) for text in texts]
        try:
            flat = [segment.encode() for of_text in segments for segment in of_text]
        except UnicodeEncodeError as error:
            raise lone_surrogate(error) from error
        threads = threads or os.cpu_count() or 1
        encoded = iter(self._processor.encode(flat, num_threads=threads))
        return [self._join(of_text, encoded) for of_text in segments]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, through the bytes that each stands for."""
        known = (self._bytes[i] for i in ids if i < self.vocabulary_size)
        return b"".join(known).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that one id stands for; none for special ids."""
        return self._bytes[token]

    def export(self, folder: Path) -> dict[str, Any]:
        """Write tokenizer.model, and the same rules as a tokenizer.json."""
        # only an export needs the library `tokenizers`
        from pretrain.data.tokenizer_export import export_sentencepiece

        export_sentencepiece(self, self._model, folder)
        return self.generation_ids()

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
