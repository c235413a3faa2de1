"""How YAML and overrides become a configuration, and how a run folder keeps one.

Hydra composes once; past this module nobody sees a DictConfig. A run freezes its configuration
as config.yaml; later lives read that file, with the overrides that they were given on top.
"""

import dataclasses
import difflib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from pretrain import config as tree
from pretrain.errors import CheckpointError, ConfigError
from pretrain.optim.config import AdamWConfig, EllisAdamConfig
from pretrain.paths import config_source
from pretrain.secrets import has_secret, secret_values

log = logging.getLogger(__name__)

SCHEMAS = {
    "train": tree.TrainConfig,
    "data": tree.InspectTrainConfig,
    "doctor": tree.DoctorConfig,
    "evaluate": tree.EvaluateConfig,
    "harness": tree.HarnessConfig,
    "generate": tree.GenerateConfig,
    "report": tree.ReportConfig,
    "top": tree.TopConfig,
    "sync": tree.SyncConfig,
    "replay": tree.ReplayConfig,
    "adopt": tree.AdoptConfig,
    "export": tree.ExportConfig,
    "submit": tree.SubmitConfig,
    "sweep": tree.SweepConfig,
}
OPTIMIZERS = {"ellis-adam": EllisAdamConfig, "adamw": AdamWConfig}

# What a later life of a run may not change: the stream of rows, depths and states, and the model.
FIXED_FOR_A_RUN = (
    "model.",
    "depth.",
    "run.seed",
    "data.sources",
    "data.window_shards",
    "data.milestones",
    "optimizer.name",
    "tokenizer.vocabulary_size",
)
# But how the same model is computed is free.
FREE_FOR_A_RUN = ("model.path", "model.no_grad_precision", "model.grad_precision")

# Of files whose keys are those of other groups: the first line that says so is missing.
_NO_PACKAGE = re.compile(r"In '((\w+)/[^']+)': .*\nKey '\2' not in '")
_NO_SLASH = re.compile(r"Could not override '(?:experiment|debug|user)/([\w-]+)@")
# Commas without brackets or quotes.
_AMBIGUOUS = re.compile(r"^Ambiguous value for argument '([^=]+)=(.*)'$", re.M)
# What Hydra says of an option that a group has not.
_NO_OPTION = re.compile(
    r"Could not find '([^']+)/([^/']+)'\s+Available options in '[^']+':\n((?:\t.*\n?)+)"
)


def register_schemas() -> None:
    """Tell Hydra the types of every key; harmless to call again."""
    store = ConfigStore.instance()
    for primary, schema in SCHEMAS.items():
        store.store(name=f"{primary}_schema", node=schema)
    store.store(group="optimizer", name="ellis_adam_schema", node=EllisAdamConfig)
    store.store(group="optimizer", name="adamw_schema", node=AdamWConfig)


def load(primary: str, overrides: Sequence[str], *, resumes: bool = False) -> Any:
    """The configuration named `primary` (a key of SCHEMAS) with overrides.

    With `resumes`, a run folder that exists gives its frozen config.yaml as the base, unless the
    overrides choose groups (experiment=..., model=...): then the composed configuration counts,
    said in a WARNING, and `check_resumable` compares it with the frozen one before training.

    Raises ConfigError for unknown keys, wrong types, missing values and failed cross-checks.
    """
    _check_hydra_overrides(overrides)
    composed = _compose(primary, overrides)
    try:
        frozen = Path(composed.run.dir) / "config.yaml" if resumes else None
        if frozen is not None and frozen.is_file():
            if not _chooses_groups(overrides):
                return _load_frozen(frozen, overrides, composed, SCHEMAS[primary])
            log.warning("groups are chosen, so conf/ counts and %s does not", frozen)
        return to_object(composed, f"conf/{primary}.yaml")
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from error


def _load_frozen(frozen: Path, overrides: Sequence[str], composed: DictConfig, schema: Any) -> Any:
    log.info("%s exists: its settings count, not those of conf/", frozen)
    try:
        node = _read(frozen, schema)
        for key in composed.keys() - {field.name for field in dataclasses.fields(tree.TrainConfig)}:
            # what a command asks for is no part of a run
            node[key] = composed[key]
        return to_object(_apply(node, overrides), str(frozen))
    except ConfigError as error:
        raise ConfigError(
            f"{error}\nThe other settings are those of {frozen}; for another run give run.name=..."
        ) from error


def names_run(overrides: Sequence[str]) -> bool:
    """Whether the overrides say which run is meant."""
    return any(text.split("=")[0] in ("run.dir", "run.name") for text in overrides)


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Hydra's reading of key=value; ConfigError for what cannot be read."""
    try:
        return list(OverridesParser.create().parse_overrides(list(overrides)))
    except OverrideParseException as error:
        raise _unreadable(error) from error


def freeze(config: tree.TrainConfig) -> str:
    """The configuration as YAML, every value resolved."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def as_dict(config: tree.TrainConfig) -> dict[str, Any]:
    """The configuration as plain values (enums by name)."""
    return cast(
        dict[str, Any],
        OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True),
    )


def thaw(run_dir: Path) -> tree.TrainConfig:
    """The configuration that the run in `run_dir` froze; CheckpointError if there is none."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise CheckpointError(
            f"{run_dir} is no run folder: it has no config.yaml. Give run.dir=... of a run that "
            "`pretrain train` has started."
        )
    return cast(tree.TrainConfig, to_object(_read(path), str(path)))


def differences(old: tree.TrainConfig, new: tree.TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with both values."""
    before, after = _flatten(as_dict(old)), _flatten(as_dict(new))
    keys = sorted(before.keys() | after.keys())
    return {
        key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)
    }


def check_resumable(old: tree.TrainConfig, new: tree.TrainConfig) -> None:
    """Refuse a life whose model or stream differs from the run's.

    Raises ConfigError that names each fixed key with both values.
    """
    changed = {
        key: values
        for key, values in differences(old, new).items()
        if key.startswith(FIXED_FOR_A_RUN) and key not in FREE_FOR_A_RUN
    }
    if old.data.sources.keys() != new.data.sources.keys():
        # a line each for what only one of the two has would bury the rest
        changed = {key: v for key, v in changed.items() if not key.startswith("data.sources")}
        changed["data.sources"] = (_names(old.data.sources), _names(new.data.sources))
    refused = [
        f"  {key}: {was} in the run folder, {now} asked for" for key, (was, now) in changed.items()
    ]
    if refused:
        folder = Path(new.run.dir)
        has_begun = (folder / "metrics.jsonl").exists() or (folder / "checkpoints").exists()
        raise ConfigError(
            f"{folder} holds another run; these may not change when it resumes:\n"
            + "\n".join(refused)
            + "\nChoose another run.dir (or run.name), or drop the override. Where a group is "
            "chosen, such as engine=..., the run's own settings do not count: give keys, such as "
            "engine.zero_stage=3, or all that the run was started with."
            + ("" if has_begun else " It has taken no step: if no job waits for it, remove it.")
        )


def _names(sources: Iterable[str]) -> str:
    return ", ".join(sources) or "none"


def compose_to_show(primary: str, overrides: Sequence[str]) -> tuple[DictConfig, dict[str, Any]]:
    """The configuration as composed, values that are missing included; and each group's options.

    Raises ConfigError as `load` does, but for what is missing or does not go together.
    """
    node = _compose(primary, overrides)
    with _initialized():
        loader = GlobalHydra.instance().config_loader()
        groups = {
            group: [name for name in loader.get_group_options(group) if name[-7:] != "_schema"]
            for group in sorted(loader.list_groups("") or [])
            if group != "hydra"
        }
    return node, groups


def _initialized() -> AbstractContextManager[Any]:
    source = config_source()
    is_installed = source.startswith("pkg://")
    initialize = initialize_config_module if is_installed else initialize_config_dir
    return initialize(source.removeprefix("pkg://"), version_base="1.3")


def _compose(primary: str, overrides: Sequence[str]) -> DictConfig:
    register_schemas()
    try:
        with _initialized():
            return compose(primary, overrides=list(overrides))
    except OverrideParseException as error:
        raise _unreadable(error) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error) + _nearest_key(error, primary)) from error
    except YAMLError as error:
        raise ConfigError(f"A file of conf/ is no YAML: {error}.") from error
    except ValueError as error:
        # Hydra's word for group=null
        raise ConfigError(f"{error}. Leave a group out with ~experiment, not null.") from error


def _unreadable(error: OverrideParseException) -> ConfigError:
    return ConfigError(
        f"{error.override} cannot be read as key=value. A value with special characters needs "
        "two pairs of quotes: generate.prompt='\"def main(\"'"
    )


def to_object(node: Any, where: str) -> Any:
    """Our dataclasses from a composed node; `where` names it in a ConfigError."""
    missing = sorted(str(key) for key in OmegaConf.missing_keys(node))
    if missing:
        raise ConfigError(f"{where} needs a value for {', '.join(missing)}: {missing[0]}=...")
    try:
        return OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from error
    except AttributeError as error:
        # a key forced in with +, which the slots of our dataclasses have no place for
        raise ConfigError(f"Nothing reads this key: {error}.") from error


def _read(path: Path, kind: Any = tree.TrainConfig) -> Any:
    try:
        loaded = OmegaConf.load(path)
        schema = OmegaConf.structured(kind)
        name = OmegaConf.select(loaded, "optimizer.name")
        if name not in OPTIMIZERS:
            raise ConfigError(
                f"{path}: optimizer.name={name} is unknown; there are {', '.join(OPTIMIZERS)}."
            )
        schema.optimizer = OmegaConf.structured(OPTIMIZERS[name])
        return OmegaConf.merge(schema, loaded)
    except (OmegaConfBaseException, OSError) as error:
        raise ConfigError(f"{path}: {_explain(error)}") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is damaged: {error}. It is the run's configuration; restore it, or start "
            "another run."
        ) from error


def _apply(node: Any, overrides: Sequence[str]) -> Any:
    parsed = parse_overrides(overrides)
    names_folder = any(override.key_or_group == "run.dir" for override in parsed)
    for override in parsed:
        if override.is_delete():
            raise ConfigError(
                f"{override.input_line}: a run that exists takes key=value and +key=value only; "
                "key=null unsets what may be unset."
            )
        if override.key_or_group == "run.name" and not names_folder:
            # it led to the folder, which may have another name inside
            continue
        try:
            OmegaConf.update(node, override.key_or_group, override.value(), merge=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{override.input_line}: {_explain(error)}") from error
    return node


def _chooses_groups(overrides: Sequence[str]) -> bool:
    keys = (re.split(r"[=@]", text.lstrip("+~"), maxsplit=1)[0] for text in overrides)
    return any("." not in key for key in keys)


def _check_hydra_overrides(overrides: Sequence[str]) -> None:
    """Hydra itself lets misspelt hydra.* keys pass."""
    for text in overrides:
        key = re.split(r"[=@]", text.lstrip("+~"), maxsplit=1)[0]
        if not key.startswith("hydra."):
            continue
        node: Any = HydraConf
        for part in key.split(".")[1:]:
            if not dataclasses.is_dataclass(node):
                break
            kinds = {field.name: field.type for field in dataclasses.fields(node)}
            if part not in kinds:
                near = difflib.get_close_matches(part, kinds, n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise ConfigError(f"{text}: there is no key {key} in Hydra's configuration.{hint}")
            node = kinds[part]


def _explain(error: BaseException) -> str:
    """The innermost reason, which Hydra and OmegaConf wrap several times over."""
    while error.__cause__ is not None and not isinstance(error, ConfigError):
        error = error.__cause__
    text = str(error).split("\n    full_key:")[0].split("\nConfig search path")[0].strip()
    key = getattr(error, "full_key", None)
    if key and text.endswith(" is not in struct"):
        group, _, name = key.rpartition(".")
        return f"There is no {name} in {group} yet; '+{group}={{{name}: ...}}' adds it."
    if text.startswith("Invalid type assigned: dict"):
        return f"{text}\nAdd what has keys of its own in braces: '+GROUP={{NAME: {{KEY: VALUE}}}}'."
    if text.endswith("is not a ListConfig, list or tuple."):
        return f"{key} takes a list: {key}='[{getattr(error, 'value', '...')}]'."
    value = getattr(error, "value", None)
    if isinstance(value, float) and value.is_integer() and text.endswith("to Integer"):
        return f"{key}={value} is no whole number for YAML; write {key}={int(value):_}."
    if found := _AMBIGUOUS.search(text):
        key, value = found.groups()
        return (
            f"{key}={value} may be a list, a text or values of a sweep. A list: {key}='[{value}]'; "
            f"a text: {key}='\"{value}\"'; a sweep: add --multirun."
        )
    if found := _NO_PACKAGE.search(text):
        return (
            f"conf/{found[1]}.yaml sets keys of its own group, {found[2]}, which has none. Make "
            "its first line `# @package _global_`."
        )
    if found := _NO_SLASH.search(text):
        return f"{text} Write it with a slash: override /{found[1]}."
    text = _name_options(text)
    return f"{key}: {text}" if key and key not in text else text


def _name_options(text: str) -> str:
    """Hydra's list of a group's options in one line, less the schemas, which are no choice."""
    found = _NO_OPTION.search(text)
    if not found:
        return text
    group, asked, listed = found.groups()
    options = [name for name in listed.split() if not name.endswith("_schema")]
    near = difflib.get_close_matches(asked, options, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    where = text[: found.start()].removeprefix("In 'groups': ")
    return f"{where}{group}={asked}: {group} is one of {', '.join(options)}.{hint}"


def _nearest_key(error: BaseException, primary: str) -> str:
    """A line to append: what may have been meant by a key that there is not."""
    while not isinstance(error, ConfigKeyError | ConfigAttributeError):
        # Hydra breaks the chain of causes where a file is merged
        inner = error.__cause__ or error.__context__
        if inner is None:
            return ""
        error = inner
    asked, owner = error.full_key, error.object_type
    if owner is tree.RunFolderConfig:
        return "\nThis command takes a run's folder: run.dir=out/runs/NAME."
    if not dataclasses.is_dataclass(owner):
        return ""
    group, _, name = (asked or str(error.key)).rpartition(".")
    beside = [field.name for field in dataclasses.fields(owner)]
    if near := difflib.get_close_matches(name, beside, n=1):
        return f"\nDid you mean {group}{'.' * bool(group)}{near[0]}?"
    known = _known_keys(SCHEMAS[primary])
    if found := [key for key in known if key.rpartition(".")[2] == name]:
        return f"\nDid you mean {' or '.join(found)}?"
    if group:
        return f"\n{group} has {', '.join(beside)}."
    return "\n--help shows every key."


def _known_keys(schema: Any, prefix: str = "") -> list[str]:
    keys = []
    for field in dataclasses.fields(schema):
        keys.append(prefix + field.name)
        if dataclasses.is_dataclass(field.type):
            keys += _known_keys(field.type, f"{prefix}{field.name}.")
    return keys


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        elif value != {}:
            flat[prefix + key] = value
    return flat


def refuse_secrets(config: tree.TrainConfig) -> None:
    """Raise ConfigError, naming the key and not the value, if a setting holds a secret."""
    values = secret_values(os.environ)
    for key, value in _leaves(as_dict(config)):
        if isinstance(value, str) and has_secret(value, values):
            raise ConfigError(
                f"{key} holds a secret (a password or signature in a URL, or the value of a secret "
                "environment variable), and a run keeps its configuration in many files. Leave it "
                "out: credentials belong in the environment or in the object store's own files."
            )


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for name, inner in pairs:
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def write_frozen(config: tree.TrainConfig, run_dir: Path) -> None:
    """Write config.yaml into the run folder, whole or not at all."""
    run_dir.mkdir(parents=True, exist_ok=True)
    temporary = run_dir / f"config.yaml.tmp-{os.getpid()}"
    temporary.write_text(freeze(config), encoding="utf-8")
    temporary.replace(run_dir / "config.yaml")
