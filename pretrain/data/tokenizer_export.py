"""Our SentencePiece tokenizer as the files that Hugging Face's AutoTokenizer reads, same ids.

SentencePiece joins, again and again, the leftmost of the two neighbours whose union is the best
piece. `tokenizers` does the same with a list of pairs in order of preference, so every way to cut a
piece into two pieces becomes a pair, the best piece's first. Three things need care:
- Two cuts of one piece are equally good to SentencePiece, which then goes by position; in a list
  one of them comes first. It matters only where both fit and overlap, see `_cut_order`.
- We encode U+2581 as bytes and cut long texts; a pre-tokenizer makes the same cuts.
- We encode the line breaks after a header apart from the content. Nothing in a rendered chat says
  where, so the template marks the place with a noncharacter, which the pre-tokenizer takes out.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, pre_tokenizers, processors

from pretrain.data.chat import MODEL_ROLE, ROLES
from pretrain.data.special_ids import special_name
from pretrain.data.tokenizer import INFO_FILE, MAIN_FILES, SENTENCEPIECE, Tokenizer, describe
from pretrain.data.tokenizer_sentencepiece import CHUNK_CHARACTERS, SPACE_MARK

_BEGIN, _END, _PAD = (special_name(field) for field in ("begin_text", "end_text", "pad"))
# No text has it: Unicode reserves it for what programs tell themselves.
_CONTENT_MARK = "\ufdd0"


def export_sentencepiece(tokenizer: Tokenizer, model: bytes, folder: Path) -> None:
    """Write a SentencePiece model and what AutoTokenizer needs to give the same ids.

    The same for every text, however long, but for text that spells special tokens: that is read
    as them unless `split_special_tokens=True`.
    """
    rules = _tokenizer_json(model)
    special = {"bos_token": _BEGIN, "eos_token": _END, "pad_token": _PAD}
    config = special | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "chat_template": _chat_template(),
    }
    info = describe(tokenizer, SENTENCEPIECE)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MAIN_FILES[SENTENCEPIECE]).write_bytes(model)
    rules.save(str(folder / "tokenizer.json"))
    for name, content in (
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", special),
        (INFO_FILE, info),
    ):
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def _tokenizer_json(model: bytes) -> tokenizers.Tokenizer:
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece.Type
    normal = {
        piece.piece.replace(SPACE_MARK, " "): piece.score
        for piece in proto.pieces
        if piece.type == kinds.NORMAL
    }
    vocabulary = {piece.piece.replace(SPACE_MARK, " "): i for i, piece in enumerate(proto.pieces)}
    assert len(vocabulary) == len(proto.pieces)
    rules = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=list(_merges(normal)), byte_fallback=True)
    )
    rules.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(rf"(?<=\A\n\n){_CONTENT_MARK}"), "removed"),
            pre_tokenizers.Split(tokenizers.Regex(_cuts()), "isolated"),
        ]
    )
    rules.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    rules.post_processor = processors.TemplateProcessing(
        single=f"{_BEGIN} $A", special_tokens=[(_BEGIN, vocabulary[_BEGIN])]
    )
    rules.add_special_tokens(
        [
            tokenizers.AddedToken(piece.piece, special=True, normalized=False)
            for piece in proto.pieces
            if piece.type == kinds.CONTROL
        ]
    )
    return rules


def _merges(scores: dict[str, float]) -> Iterator[tuple[str, str]]:
    """Pairs of pieces that make a piece, the pairs of better pieces first."""
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        cuts = [i for i in range(1, len(piece)) if {piece[:i], piece[i:]} <= scores.keys()]
        for i in sorted(cuts, key=lambda i: _cut_order(piece, i)):
            yield piece[:i], piece[i:]


def _cut_order(piece: str, cut: int) -> tuple[int, bool, int]:
    """Sorts the cuts of a piece: x|y before y|z if x + y and y + z are both the piece.

    Where x, y, z follow each other, SentencePiece joins x and y, since they stand further left.
    A piece such as "aaa" has both a|aa and aa|a in the place of x|y. Then the longer left part goes
    first: runs are joined from their left end, so that a shorter rest is found at the right.
    """
    other = len(piece) - cut
    goes_left = piece[cut:] == piece[:other]
    return min(cut, other), not goes_left, -cut


def _cuts() -> str:
    """A regular expression whose matches are the segments that we encode on their own."""
    part, chunk = f"[^{SPACE_MARK}]", CHUNK_CHARACTERS
    rest = rf"{part}{{1,{chunk}}}(?={SPACE_MARK}|\z)"
    return rf"{SPACE_MARK}|{rest}|{part}{{0,{chunk - 1}}}\n|{part}{{{chunk}}}"


def _chat_template() -> str:
    """Jinja for `encode_document` of a chat, or `encode_prompt` with add_generation_prompt."""
    header, end_header, end_turn = (
        special_name(field) for field in ("begin_header", "end_header", "end_turn")
    )
    return (
        f"{{%- set roles = {json.dumps(ROLES)} -%}}"
        "{{- bos_token -}}"
        "{%- for message in messages -%}"
        "{%- if message['role'] not in roles -%}"
        "{{- raise_exception('unknown role ' ~ message['role']) -}}"
        "{%- endif -%}"
        f"{{{{- '{header}' ~ roles[message['role']] ~ '{end_header}\\n\\n{_CONTENT_MARK}' -}}}}"
        f"{{{{- message['content'].strip() ~ '{end_turn}' -}}}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}"
        f"{{{{- '{header}{MODEL_ROLE}{end_header}\\n\\n' -}}}}"
        "{%- else -%}"
        "{{- eos_token -}}"
        "{%- endif -%}"
    )
