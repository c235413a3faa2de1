"""What `pretrain COMMAND --help` says: every setting of the command, its value and its meaning.

Meanings are the strings under the fields of our dataclasses, so there is one place to write them.
"""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from functools import cache
from typing import Any, get_args

from omegaconf import DictConfig, ListConfig, OmegaConf

_WIDTH = 100
_FLAGS = """\
--cfg job prints these values alone, --info defaults the files that they come from, and --multirun
runs each combination of a=1,2 b=3,4 as a process of its own."""


def describe(words: str, purpose: str, node: DictConfig, groups: Mapping[str, list[str]]) -> str:
    """The help of a command whose configuration, as composed, is `node`.

    `groups` are the options of each configuration group; those that `node` has are shown.
    """
    takes_groups = "model" in node
    needed = [f"{key}=..." for key in sorted(map(str, OmegaConf.missing_keys(node)))]
    given = [*needed, *["[group=option]"] * takes_groups, "[key=value]", "[Hydra flags]"]
    usage = f"usage: pretrain {words} {' '.join(given)}"
    parts = [f"{purpose[0].upper()}{purpose[1:]}.\n\n{usage}"]
    top = [text for key, text in _entries(node, "") if not _is_section(node, key)]
    sections = [key for key in map(str, node) if _is_section(node, key)]
    parts += ["\n".join(top)] if top else []
    parts += [_section(node[key], key) for key in sections]
    if takes_groups:
        parts.append(_groups(groups))
    return "\n\n".join([*parts, _FLAGS])


def _is_section(node: DictConfig, key: str) -> bool:
    value = node._get_node(key)
    return isinstance(value, DictConfig) and dataclasses.is_dataclass(OmegaConf.get_type(value))


def _section(node: DictConfig, prefix: str) -> str:
    about = inspect.getdoc(OmegaConf.get_type(node)) or ""
    lines = [f"{prefix}: {' '.join(about.split(chr(10) * 2)[0].split())}"]
    return "\n".join([*lines, *(text for _, text in _entries(node, f"{prefix}."))])


def _entries(node: DictConfig, prefix: str) -> Iterator[tuple[str, str]]:
    """Each key of a node, and what is said of it; of nodes below it, all of their keys."""
    kind = OmegaConf.get_type(node)
    meanings = _meanings(kind) if dataclasses.is_dataclass(kind) else {}
    types = _types(kind) if meanings else {}
    for key in map(str, node):
        if _is_section(node, key):
            below = "\n".join(text for _, text in _entries(node[key], f"{prefix}{key}."))
            yield key, below
            continue
        meaning = _with_choices(meanings.get(key, ""), types.get(key))
        indented = textwrap.indent(textwrap.fill(meaning, _WIDTH - 8), " " * 8)
        yield key, f"  {prefix}{key}={_shown(node, key)}" + (f"\n{indented}" if meaning else "")


def _shown(node: DictConfig, key: str) -> str:
    """A value as it would be given, without what `${...}` stands for; ??? where one is needed."""
    held: Any = node._get_node(key)
    if isinstance(held, DictConfig | ListConfig):
        value: Any = OmegaConf.to_container(held, resolve=False, enum_to_str=True)
    else:
        value = held._value()
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, str):
        return value or "''"
    return "null" if value is None else _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        # of a source or a milestone, what is empty goes without saying
        given = {key: inner for key, inner in value.items() if inner not in (None, "", [], {})}
        return "{" + ", ".join(f"{key}: {_plain(inner)}" for key, inner in given.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(_plain, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, str) and not value.isidentifier() else str(value)


def _with_choices(meaning: str, kind: Any) -> str:
    """The meaning of a key, with the names of its enumeration if it does not go through them."""
    kinds = [each for each in (kind, *get_args(kind)) if isinstance(each, type)]
    names = [option.name for each in kinds if issubclass(each, Enum) for option in each]
    if all(f"{name}:" in meaning for name in names):
        return meaning
    return f"{meaning} One of {', '.join(names)}.".strip()


def _types(kind: Any) -> dict[str, Any]:
    return {field.name: field.type for field in dataclasses.fields(kind)}


@cache
def _meanings(kind: type) -> dict[str, str]:
    """The string under each field of a dataclass and of those that it inherits from."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(each):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(body, ast.ClassDef)
        for field, after in zip(body.body, body.body[1:], strict=False):
            match field, after:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    found[name] = " ".join(text.split())
    return found


def _groups(groups: Mapping[str, list[str]]) -> str:
    known = {name: options for name, options in groups.items() if options}
    width = max(map(len, known))
    lines = [
        textwrap.fill(
            ", ".join(options),
            _WIDTH,
            initial_indent=f"  {name:<{width}}  ",
            subsequent_indent=" " * (width + 4),
            break_on_hyphens=False,
        )
        for name, options in known.items()
    ]
    return "\n".join(["Groups; GROUP=OPTION takes conf/GROUP/OPTION.yaml:", *lines])
