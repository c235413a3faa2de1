"""A document as token ids: begin_text, its text or turns, end_text.

A turn is `<|begin_header|>role<|end_header|>`, a blank line, `content<|end_turn|>`: the published
chat template (arXiv 2502.05171). Special ids are put in by this code alone: text that spells
them stays text.
"""

from collections.abc import Sequence

from pretrain.data.chat import MODEL_ROLE, Message
from pretrain.data.documents import Document
from pretrain.data.tokenizer import Tokenizer


def encode_document(tokenizer: Tokenizer, document: Document) -> list[int]:
    """Ids of one document, framed; turns of a chat carry their special ids."""
    return encode_documents(tokenizer, [document])[0]


def encode_documents(
    tokenizer: Tokenizer, documents: list[Document], threads: int = 1
) -> list[list[int]]:
    """Ids of each document; the same as one at a time, on several threads."""
    texts = ["" if document.messages else document.text for document in documents]
    bodies = tokenizer.encode_batch(texts, threads)
    begin, end = tokenizer.special.begin_text, tokenizer.special.end_text
    framed = []
    for document, body in zip(documents, bodies, strict=True):
        turns = encode_turns(tokenizer, document.messages) if document.messages else body
        framed.append([begin, *turns, end])
    return framed


def encode_turns(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids of the turns, without begin_text and end_text."""
    ids: list[int] = []
    for message in messages:
        ids += _encode_header(tokenizer, message.role)
        ids += tokenizer.encode(message.content.strip())
        ids.append(tokenizer.special.end_turn)
    return ids


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids that ask the model for its turn; a prefix of the whole chat's ids."""
    begin = [tokenizer.special.begin_text]
    return begin + encode_turns(tokenizer, messages) + _encode_header(tokenizer, MODEL_ROLE)


def _encode_header(tokenizer: Tokenizer, role: str) -> list[int]:
    # The line breaks are encoded on their own, so that no piece joins them with the content and
    # a prompt stays a prefix of the chat that continues it.
    special = tokenizer.special
    name = tokenizer.encode(role)
    return [special.begin_header, *name, special.end_header, *tokenizer.encode("\n\n")]
