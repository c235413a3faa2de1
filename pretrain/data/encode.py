"""A document as token ids: begin_text, its text or turns, end_text.

A turn is `<|begin_header|>role<|end_header|>`, a blank line, `content<|end_turn|>`: the published
chat template (arXiv 2502.05171). With a tokenizer of ours special ids are put in by this code
alone, and text that spells them stays text. An adopted tokenizer reads them where they are spelled,
so a chat is written out and encoded in one piece, as Hugging Face programs do.
"""

from collections.abc import Sequence

from pretrain.data.chat import MODEL_ROLE, Message
from pretrain.data.documents import Document
from pretrain.data.special_ids import special_name
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import DataError


def encode_document(tokenizer: Tokenizer, document: Document) -> list[int]:
    """Ids of one document, framed; turns of a chat carry their special ids."""
    return encode_documents(tokenizer, [document])[0]


def encode_documents(
    tokenizer: Tokenizer, documents: list[Document], threads: int = 1
) -> list[list[int]]:
    """Ids of each document; the same as one at a time, on several threads.

    Raises DataError, naming the document, for a chat if the tokenizer has no ids for turns.
    """
    texts = ["" if document.messages else document.text for document in documents]
    bodies = tokenizer.encode_batch(texts, threads)
    begin, end = tokenizer.special.begin_text, tokenizer.special.end_text
    framed = []
    for document, body in zip(documents, bodies, strict=True):
        if document.messages:
            body = encode_turns(tokenizer, document.messages, where=document.id)
        framed.append([begin, *body, end])
    return framed


def encode_turns(
    tokenizer: Tokenizer, messages: Sequence[Message], *, where: str = "the chat"
) -> list[int]:
    """Ids of the turns, without begin_text and end_text; `where` names them in a DataError."""
    return _encode_spans(tokenizer, [span for turn in messages for span in _turn(turn)], where)


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids that ask the model for its turn; with our tokenizers a prefix of the whole chat's ids."""
    spans = [span for turn in messages for span in _turn(turn)] + _header(MODEL_ROLE)
    return [tokenizer.special.begin_text, *_encode_spans(tokenizer, spans, "the prompt")]


class _Mark(str):
    """A special token by its field's name, among spans of text."""


_MARKS = _HEADER, _END_HEADER, _END_TURN = (
    _Mark("begin_header"),
    _Mark("end_header"),
    _Mark("end_turn"),
)


def _header(role: str) -> list[str]:
    # The line breaks are a span of their own, so that no piece joins them with the content and a
    # prompt stays a prefix of the chat that continues it.
    return [_HEADER, role, _END_HEADER, "\n\n"]


def _turn(message: Message) -> list[str]:
    return [*_header(message.role), message.content.strip(), _END_TURN]


def _encode_spans(tokenizer: Tokenizer, spans: list[str], where: str) -> list[int]:
    known = tokenizer.special.known()
    if missing := [special_name(mark) for mark in _MARKS if mark not in known]:
        raise DataError(
            f"{where} is a chat, but the tokenizer has no {', '.join(missing)}: give it as plain "
            "text, or use a tokenizer that has them."
        )
    if tokenizer.reads_special:
        names = tokenizer.special_names
        return tokenizer.encode(
            "".join(names[known[span]] if isinstance(span, _Mark) else span for span in spans)
        )
    ids: list[int] = []
    for span in spans:
        ids += [known[span]] if isinstance(span, _Mark) else tokenizer.encode(span)
    return ids
