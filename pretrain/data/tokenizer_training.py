"""How a tokenizer is trained: a sample of the sources by their weights, and SentencePiece's BPE.

The model's bytes depend on the text and the settings alone, not on the number of threads.
"""

import hashlib
import io
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from pretrain.data.config import DataConfig, TokenizerConfig
from pretrain.data.documents import Part, cut_at_blank_lines
from pretrain.data.progress import Progress
from pretrain.data.sources import find_parts, read_documents
from pretrain.data.special_ids import RESERVED, special_ids, special_names
from pretrain.errors import ConfigError, DataError

# Multi-line chunks, so that pieces such as ":\n" are learned; SentencePiece calls them sentences.
CHUNK_CHARACTERS = 8192
PIECE_CHARACTERS = 16
# 256 bytes, the special ids, and the piece for what is unknown; sums of digits need 301.
SMALLEST = 256 + RESERVED + 1
# 4096 pieces from 4 MB of the embedded corpus: 2.73 bytes per token; from 8 MB: 2.75.
BYTES_PER_PIECE = 1000
# Text whose encoded length is reported afterwards.
PROBE_EVERY_CHUNKS = 64
TICK_S = 0.2
# Two cores took 11 s for 50 MB and 65,536 pieces: SentencePiece 0.2.3.
LEARN_S_PER_BYTE = 0.22e-6


class Sample:
    """Text to learn pieces from, as chunks; counts and hashes what was taken from it."""

    def __init__(self, config: DataConfig, train_bytes: int) -> None:
        self.train_bytes = train_bytes
        self.source_bytes: dict[str, int] = {}
        self.documents = 0
        self.probe: list[str] = []
        self.is_complete = threading.Event()
        self._config = config
        self._hash = hashlib.sha256()

    @property
    def bytes(self) -> int:
        """Bytes of text taken so far."""
        return sum(self.source_bytes.values())

    @property
    def fingerprint(self) -> str:
        """sha256 of the text taken so far."""
        return self._hash.hexdigest()

    def chunks(self) -> Iterator[str]:
        """The text, source by source, each up to its share of train_bytes."""
        parts = {
            name: [part for part in own if not part.is_held_out]
            for name, own in find_parts(self._config).items()
        }
        sizes = {name: sum(p.stored_bytes for p in source) for name, source in parts.items()}
        shares = source_shares(self._config, sizes)
        number = 0
        with Progress("reading", self.train_bytes) as progress:
            for name, source in parts.items():
                self.source_bytes[name] = 0
                for text in self._texts(source, int(self.train_bytes * shares[name])):
                    for chunk in cut_at_blank_lines(text, CHUNK_CHARACTERS):
                        if number % PROBE_EVERY_CHUNKS == 0:
                            self.probe.append(chunk)
                        number += 1
                        yield chunk
                    progress.advance(steps=self.bytes - progress.done)
        self.is_complete.set()

    def _texts(self, parts: list[Part], quota: int) -> Iterator[str]:
        """Documents of a source up to its quota, which its parts share by their size."""
        left = sum(part.stored_bytes for part in parts)
        for part in parts:
            allowance = quota * part.stored_bytes // max(left, 1)
            left -= part.stored_bytes
            taken = 0
            for document in read_documents(part, self._config) if allowance else ():
                content = document.text.encode()
                taken += len(content)
                self.documents += 1
                self.source_bytes[part.source] += len(content)
                self._hash.update(content)
                yield document.text
                if taken >= allowance:
                    break
            quota -= taken


def source_shares(config: DataConfig, sizes: dict[str, int]) -> dict[str, float]:
    """Each source's share of the sample: by the weights, or without any by the sizes."""
    weights = {name: source.weight for name, source in config.sources.items()}
    amounts = {name: float(weights.get(name) or 0) for name in sizes}
    if not any(amounts.values()):
        amounts = {name: float(size) for name, size in sizes.items()}
    total = sum(amounts.values()) or 1.0
    return {name: amount / total for name, amount in amounts.items()}


def train_bytes(config: TokenizerConfig) -> int:
    """How much text pieces are learned from."""
    return config.train_bytes or BYTES_PER_PIECE * config.vocabulary_size


def training_settings(config: TokenizerConfig, data: DataConfig) -> dict[str, Any]:
    """What a tokenizer depends on besides the bytes of the text; kept beside it."""
    settings: dict[str, Any] = {
        "tokenizer.vocabulary_size": config.vocabulary_size,
        "tokenizer.train_bytes": train_bytes(config),
        "tokenizer.character_coverage": config.character_coverage,
        "data.corpus": data.corpus.value,
        "data.text_key": data.text_key,
        "data.max_bytes": data.max_bytes,
    }
    if data.valid_paths:
        settings["data.valid_paths"] = list(data.valid_paths)
    if data.max_digits is not None:
        settings["data.max_digits"] = data.max_digits
        settings["data.digit_order"] = data.digit_order.value
    for name, source in data.sources.items():
        settings[f"data.sources.{name}.paths"] = list(source.paths)
        settings[f"data.sources.{name}.weight"] = source.weight
        settings[f"data.sources.{name}.text_key"] = source.text_key
    return settings


def train(config: TokenizerConfig, data: DataConfig) -> tuple[bytes, Sample]:
    """A SentencePiece model with our special ids, and the sample that it was learned from.

    Raises DataError if there is no text, or too little or too varied for the vocabulary.
    """
    if config.vocabulary_size < SMALLEST:
        raise ConfigError(
            f"tokenizer.vocabulary_size={config.vocabulary_size} leaves no room beside 256 bytes "
            f"and {RESERVED} special ids; choose more than {SMALLEST} (4096 is small)."
        )
    sample = Sample(data, train_bytes(config))
    learned = config.vocabulary_size - RESERVED
    buffer = io.BytesIO()
    stopped: list[BaseException] = []
    with _learning_progress(sample):
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_keep_error(sample.chunks(), stopped),
                model_writer=buffer,
                vocab_size=learned,
                character_coverage=config.character_coverage,
                num_threads=config.threads or os.cpu_count(),
                **TRAINER,
            )
        except RuntimeError as error:
            if stopped:
                # the trainer would bury what is wrong with the text, or Ctrl-C, in words of its own
                raise stopped[0] from None
            raise _training_error(error, sample, config) from error
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(buffer.getvalue())
    if len(model.pieces) < learned:
        raise DataError(
            f"tokenizer.vocabulary_size={config.vocabulary_size} is more than {sample.bytes} bytes "
            f"of text give: at most {len(model.pieces) + RESERVED}. Choose that, or add text."
        )
    return _with_special_pieces(model, config.vocabulary_size), sample


TRAINER: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "allow_whitespace_only_pieces": True,
    "max_sentencepiece_length": PIECE_CHARACTERS,
    "max_sentence_length": 4 * CHUNK_CHARACTERS + 1,
    "unk_id": 0,
    "bos_id": -1,
    "eos_id": -1,
    "pad_id": -1,
    # a vocabulary that cannot be filled is reported by us, with numbers
    "hard_vocab_limit": False,
    "minloglevel": 2,
}
"""What every tokenizer of ours has in common."""


def _keep_error(chunks: Iterator[str], stopped: list[BaseException]) -> Iterator[str]:
    """The chunks; what ends them early goes into `stopped` too."""
    try:
        yield from chunks
    except BaseException as error:
        stopped.append(error)
        raise


def _training_error(error: RuntimeError, sample: Sample, config: TokenizerConfig) -> DataError:
    if sample.bytes == 0:
        return DataError("The corpus has no documents with text; there is nothing to learn from.")
    needed = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
    if needed:
        return DataError(
            f"tokenizer.vocabulary_size={config.vocabulary_size} is too small: the single bytes, "
            f"characters and special tokens alone need {int(needed[1]) + RESERVED}. Choose more, "
            f"or lower tokenizer.character_coverage={config.character_coverage}."
        )
    return DataError(f"SentencePiece cannot learn from {sample.bytes} bytes of text: {error}")


def _with_special_pieces(model: Any, vocabulary_size: int) -> bytes:
    """The model's bytes with control pieces appended at the top; text never encodes to those."""
    for name in special_names():
        piece = model.pieces.add()
        piece.piece, piece.score = name, 0.0
        piece.type = sentencepiece_model_pb2.ModelProto.SentencePiece.Type.CONTROL
    spec, special = model.trainer_spec, special_ids(vocabulary_size)
    spec.vocab_size = vocabulary_size
    spec.bos_id, spec.eos_id, spec.pad_id = special.begin_text, special.end_text, special.pad
    spec.bos_piece, spec.eos_piece, spec.pad_piece = (
        special_names()[i - special.begin_text] for i in (spec.bos_id, spec.eos_id, spec.pad_id)
    )
    # The pieces do not depend on it, so the file should not.
    spec.ClearField("num_threads")
    return bytes(model.SerializeToString(deterministic=True))


@contextmanager
def _learning_progress(sample: Sample) -> Iterator[None]:
    """Shows time left once the text is read; from a thread, since the trainer has no callback."""
    finished = threading.Event()
    thread = threading.Thread(target=_show_learning, args=(sample, finished), daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        sample.is_complete.set()
        thread.join()


def _show_learning(sample: Sample, finished: threading.Event) -> None:
    sample.is_complete.wait()
    if finished.is_set():
        return
    ticks = int(LEARN_S_PER_BYTE * sample.bytes / TICK_S) + 1
    with Progress("learning", ticks) as progress:
        # Past the expected time the bar stays just short of its end.
        while not finished.wait(TICK_S):
            progress.advance(steps=int(progress.done < ticks - 1))
