"""A tokenizer that came with published weights: a Hugging Face tokenizer.json, taken as it is.

Ids are those of `AutoTokenizer(text, add_special_tokens=False)`: special tokens that a text spells
are read as such, tokens that only tokenizer_config.json names are added as transformers adds them,
and what the tokenizer itself would put around a text is left to encode.py.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from pretrain.data.special_ids import SpecialIds, special_name
from pretrain.data.tokenizer import (
    ADOPTED,
    INFO_FILE,
    MAIN_FILES,
    SENTENCEPIECE,
    Tokenizer,
    describe,
    kind_of,
    lone_surrogate,
    read_info,
    read_main_file,
    write_folder,
)
from pretrain.errors import DataError

log = logging.getLogger(__name__)

JSON_FILE = MAIN_FILES[ADOPTED]
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"
FILES = (JSON_FILE, CONFIG_FILE, SPECIAL_FILE, "chat_template.jinja")
"""What is copied; all but the first may be missing."""
# The order in which transformers adds those that tokenizer.json lacks.
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# Classes that take tokenizer.json as it is; others may rebuild parts of it.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend", None)


class AdoptedTokenizer(Tokenizer):
    """A folder's tokenizer.json with what its other files say of special tokens."""

    reads_special = True

    def __init__(self, folder: Path, content: bytes) -> None:
        """`content` is the folder's tokenizer.json. Raises DataError if it cannot be used."""
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._folder = folder
        self._config = _read_json(folder / SPECIAL_FILE) | _read_json(folder / CONFIG_FILE)
        self._rules = _parse(folder / JSON_FILE, content)
        _add_tokens(self._rules, self._config)
        self._rules.encode_special_tokens = bool(self._config.get("split_special_tokens", False))
        # training takes whole texts
        self._rules.no_truncation()
        self._rules.no_padding()
        ids = self._rules.get_vocab(with_added_tokens=True)
        self.vocabulary_size = 1 + max(ids.values())
        self.special = _find_special(ids, self._config, folder)
        self.special_names = {
            i: token.content
            for i, token in self._rules.get_added_tokens_decoder().items()
            if token.special
        }
        names = {i: name for name, i in ids.items()}
        self.special_names |= {i: names[i] for i in self.special.known().values()}

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Ids of each text, with special tokens that it spells.

        One thread, or as many as there are cores: the library knows nothing in between.
        """
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise lone_surrogate(error) from error
        batches = [[text] for text in texts] if threads == 1 else [list(texts)]
        return [
            encoding.ids
            for batch in batches
            for encoding in self._rules.encode_batch_fast(batch, add_special_tokens=False)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, by the rules' own decoder."""
        plain = [i for i in ids if i not in self.special_names]
        return str(self._rules.decode(plain, skip_special_tokens=True))

    def export(self, folder: Path) -> dict[str, Any]:
        """Copy the files as they were."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*FILES, INFO_FILE):
            if (self._folder / name).is_file():
                shutil.copyfile(self._folder / name, folder / name)
        if not (self._folder / CONFIG_FILE).is_file():
            # without it AutoTokenizer does not know what to make of tokenizer.json
            special = self.special
            named = {"bos": special.begin_text, "eos": special.end_text, "pad": special.pad}
            config = {f"{role}_token": self.special_names[i] for role, i in named.items()}
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
            (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return self.generation_ids()

    def warn_of_changes(self) -> None:
        """Name what some versions of transformers do not take from tokenizer.json."""
        path, name = self._folder / CONFIG_FILE, self._config.get("tokenizer_class")
        if name not in _PLAIN_CLASSES or "auto_map" in self._config:
            log.warning(
                "%s: tokenizer_class=%s may change the rules of %s in transformers; here they "
                "count as they are in the file",
                path, name, JSON_FILE,
            )  # fmt: skip
        rules = json.loads(self._rules.to_str())["pre_tokenizer"] or {}
        wanted = bool(self._config.get("add_prefix_space", False))
        if rules.get("add_prefix_space", wanted) != wanted:
            log.warning(
                "%s: add_prefix_space=%s, but %s says otherwise; transformers 4 follows the "
                "former, transformers 5 and this program the latter",
                path, wanted, JSON_FILE,
            )  # fmt: skip


def adopt_tokenizer(source: Path, target: Path, *, vocabulary_size: int) -> Tokenizer:
    """Copy the tokenizer of a Hugging Face folder, for a model with so many embeddings.

    An export of ours gives back the tokenizer that it was made from. Raises DataError if the
    folder has none, it cannot be used, or has ids that the model does not.
    """
    files, info = read_tokenizer_files(source, vocabulary_size=vocabulary_size)
    write_folder(target, files, info)
    return Tokenizer.load(target)


def read_tokenizer_files(
    source: Path, *, vocabulary_size: int
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The files and the tokenizer_info.json of the tokenizer that `adopt_tokenizer` copies."""
    is_ours = (source / INFO_FILE).is_file() and kind_of(read_info(source)) == SENTENCEPIECE
    if is_ours:
        tokenizer = Tokenizer.load(source)
        files = {MAIN_FILES[SENTENCEPIECE]: read_main_file(source)}
        info = read_info(source)
    else:
        content = _read_tokenizer_json(source)
        tokenizer = AdoptedTokenizer(source, content)
        others = [name for name in FILES[1:] if (source / name).is_file()]
        files = {JSON_FILE: content, **{name: (source / name).read_bytes() for name in others}}
        info = describe(tokenizer, ADOPTED)
        tokenizer.warn_of_changes()
    if tokenizer.vocabulary_size > vocabulary_size:
        raise DataError(
            f"Wrong vocabulary: the tokenizer of {source} has ids up to "
            f"{tokenizer.vocabulary_size - 1}, the model has {vocabulary_size} embeddings. Put the "
            "tokenizer of these weights there."
        )
    return files, info


def _read_tokenizer_json(source: Path) -> bytes:
    try:
        return (source / JSON_FILE).read_bytes()
    except OSError as error:
        raise DataError(
            f"{source / JSON_FILE}: {error.strerror}. Put the tokenizer of these weights there, or "
            "give tokenizer.path=... of one that was trained or adopted here."
        ) from error


def _parse(path: Path, content: bytes) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except ValueError as error:
        raise DataError(f"{path} is damaged or no tokenizer: {error}. Copy it again.") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file, {} if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); copy it again.") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} holds a {type(found).__name__}, not an object; copy it again.")
    return found


def _add_tokens(rules: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Add what tokenizer.json lacks of the tokens that the configuration names."""
    named = [config.get(f"{role}_token") for role in _ROLES]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(key) or []
        named += more.values() if isinstance(more, dict) else more
    special = {_content(token) for token in named if token}
    numbered = config.get("added_tokens_decoder", {})
    added = [_added_token(numbered[key], special) for key in sorted(numbered, key=int)]
    known = {token.content for token in rules.get_added_tokens_decoder().values()}
    known |= {token.content for token in added}
    for token in named:
        if token and _content(token) not in known:
            known.add(_content(token))
            added.append(_added_token(token, special))
    rules.add_tokens(added)


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _added_token(token: str | dict[str, Any], special: set[str]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    flags = {key: token[key] for key in ("lstrip", "rstrip", "single_word") if key in token}
    is_special = bool(token.get("special", False)) or _content(token) in special
    is_normalized = bool(token.get("normalized", not is_special))
    return AddedToken(_content(token), special=is_special, normalized=is_normalized, **flags)


def _find_special(ids: dict[str, int], config: dict[str, Any], folder: Path) -> SpecialIds:
    """Special ids by their published names, or else by their roles in the configuration."""

    def find(field: str, role: str = "") -> int | None:
        named = config.get(f"{role}_token")
        found = ids.get(special_name(field))
        return ids.get(_content(named)) if found is None and named else found

    begin, end = find("begin_text", "bos"), find("end_text", "eos")
    # one token may play both parts, as in GPT-2
    begin, end = (end if begin is None else begin), (begin if end is None else end)
    if begin is None or end is None:
        raise DataError(
            f"{folder} has a tokenizer with neither {special_name('begin_text')} nor "
            f"{special_name('end_text')}, and its {CONFIG_FILE} names no bos_token or eos_token: "
            "where documents begin and end cannot be told. Name one of them there."
        )
    pad = find("pad", "pad")
    return SpecialIds(
        begin_text=begin,
        end_text=end,
        begin_header=find("begin_header"),
        end_header=find("end_header"),
        end_turn=find("end_turn"),
        pad=end if pad is None else pad,
    )
