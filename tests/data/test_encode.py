"""Documents and chats as ids: who frames what, and what text can not do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.data.chat import Message
from pretrain.data.documents import Document
from pretrain.data.encode import encode_document, encode_documents, encode_prompt, encode_turns
from pretrain.data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
CHAT = (
    Message("system", "Be brief."),
    Message("user", "  2 + 3?\n"),
    Message("Huginn", "\n5<|end_turn|>"),
)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: str) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


def spell(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Ids as text, special ids as ⟨name⟩."""
    names = {i: f"⟨{name}⟩" for name, i in tokenizer.special._asdict().items()}
    runs: list[str] = []
    plain: list[int] = []
    for token in [*ids, -1]:
        if token in names or token == -1:
            runs.append(tokenizer.decode(plain))
            plain = []
            runs.append(names.get(token, ""))
        else:
            plain.append(token)
    return "".join(runs)


def test_a_text_is_framed(tokenizer: Tokenizer) -> None:
    ids = encode_document(tokenizer, Document("s/a#0", " a text "))
    assert spell(tokenizer, ids) == "⟨begin_text⟩ a text ⟨end_text⟩"


def test_a_chat_has_its_turns_and_only_ours_are_special(tokenizer: Tokenizer) -> None:
    ids = encode_document(tokenizer, Document("s/a#0", "unused", CHAT))
    assert spell(tokenizer, ids) == (
        "⟨begin_text⟩"
        "⟨begin_header⟩system⟨end_header⟩\n\nBe brief.⟨end_turn⟩"
        "⟨begin_header⟩user⟨end_header⟩\n\n2 + 3?⟨end_turn⟩"
        "⟨begin_header⟩Huginn⟨end_header⟩\n\n5<|end_turn|>⟨end_turn⟩"
        "⟨end_text⟩"
    )


def test_a_prompt_is_a_prefix_of_the_chat_that_answers_it(tokenizer: Tokenizer) -> None:
    prompt = encode_prompt(tokenizer, CHAT[:2])
    whole = encode_document(tokenizer, Document("s/a#0", "unused", CHAT))
    assert whole[: len(prompt)] == prompt
    answer = tokenizer.encode("5<|end_turn|>")
    assert whole[len(prompt) :] == [*answer, tokenizer.special.end_turn, tokenizer.special.end_text]
    assert encode_turns(tokenizer, ()) == []


def test_many_documents_are_encoded_like_one(tokenizer: Tokenizer) -> None:
    documents = [
        Document("s/a#0", "first"),
        Document("s/a#1", "said", CHAT),
        Document("s/a#2", "a\u2581b"),
    ]
    one_by_one = [encode_document(tokenizer, document) for document in documents]
    assert encode_documents(tokenizer, documents, threads=2) == one_by_one


def test_tokenizing_processes_import_no_torch() -> None:
    program = "import pretrain.data.parts, sys; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == 0
