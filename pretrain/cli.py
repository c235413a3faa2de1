"""The command `pretrain`: words name a module, the rest are Hydra overrides.

`pretrain data build data=files` calls main of pretrain/data/build.py with the composed
configuration. Hydra's own flags (--cfg job, --info defaults, -m, ...) keep working.
"""

import logging
import os
import select
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

from pretrain.errors import EXIT_BUG, EXIT_CONFIG, EXIT_FINISHED, ConfigError, PretrainError
from pretrain.loop.exit_record import note_exit
from pretrain.loop.signals import keep_for_later
from pretrain.secrets import Redacting, redact, secret_values


class Command(NamedTuple):
    """One command."""

    words: str
    primary: str
    """The primary configuration it takes; none: its arguments are another program's."""
    purpose: str


COMMANDS = (
    Command("data tokenizer", "train", "train the tokenizer on the raw text"),
    Command("data build", "train", "pack the raw text into shards of token rows"),
    Command("data verify", "train", "check every byte of the shards"),
    Command("data inspect", "data", "show the mixture, and one row as text"),
    Command("plan", "train", "parameters, FLOPs, memory, wait and hours; no GPU needed"),
    Command("doctor", "doctor", "can this machine (or node, or job) train, and what is missing"),
    Command("train", "train", "train, or resume the run folder"),
    Command("submit", "submit", "plan and freeze a run, and start it on a cluster or other hosts"),
    Command("sweep status", "sweep", "what each run of a submitted sweep is doing"),
    Command("sweep collect", "sweep", "the runs of a sweep by held-out loss, as a table and CSV"),
    Command("evaluate", "evaluate", "held-out loss, or scores on tasks, at several depths"),
    Command("harness run", "", "lm-evaluation-harness, where --model recurrent is a run"),
    Command("harness tasks", "harness", "write files of items as tasks of lm-evaluation-harness"),
    Command("generate", "generate", "continue a prompt"),
    Command("report", "report", "one run or several as a page: curves, depth, lives, states"),
    Command("top", "top", "watch a run in the terminal"),
    Command("sync", "sync", "write the record as one W&B run, to upload from elsewhere"),
    Command("replay", "replay", "rerun the batch of one step, row by row"),
    Command("adopt", "adopt", "start a run from published weights and their tokenizer"),
    Command("export", "export", "write a run as a Hugging Face folder"),
)
# They read a run folder's own configuration if they are told which run.
ABOUT_A_RUN = (
    "data tokenizer",
    "data build",
    "data verify",
    "data inspect",
    "plan",
    "doctor",
)

# They go on with a run folder that exists, by its configuration.
RESUMING = ("train", "submit")

# what a shell says of a process that Ctrl-C has ended, and of one whose reader has gone (`| head`)
EXIT_INTERRUPTED = 130
EXIT_PIPE_CLOSED = 141
MULTIRUN_FLAGS = ("-m", "--multirun")
# Run folders are ours: Hydra makes none, and leaves logging alone.
WITHOUT_OUTPUTS = (
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)


class _ConsoleLines(Redacting):
    """News as it is; what needs somebody begins with its level and with who says it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """The line; `logging` chose the method's name."""
        return record.message if record.levelno == logging.INFO else super().formatMessage(record)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its code; docs/commands.md lists them."""
    # Before torch is loaded. OpenMP's threads spin a long while before they sleep until the others
    # come, which on two cores that have other work made 70 to 240 tokens/s of the tiny model. On
    # idle cores, against no spinning at all, so much of it makes 5,500 instead of 3,000; on cores
    # shared with two busy programs 1,900 instead of 2,700.
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = "10000"
    code = _run(list(sys.argv[1:] if arguments is None else arguments))
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = code or EXIT_PIPE_CLOSED
    sys.stderr.flush()
    # a finished process with a gloo group alive may abort in interpreter teardown (torch 2.13)
    os._exit(code)


def _run(arguments: list[str]) -> int:
    command, rest = _find(arguments)
    if command is None:
        return _explain(arguments)
    to_console = logging.StreamHandler(sys.stderr)
    to_console.setFormatter(_ConsoleLines("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[to_console])
    has_flags = any(argument.startswith("-") for argument in rest)
    if command.words == "train" and not has_flags:
        # importing torch and composing take seconds, on many nodes minutes
        keep_for_later()
    try:
        module = import_module("pretrain." + command.words.replace(" ", "."))
        if not command.primary:
            return int(module.main(rest))
        if has_flags:
            return _run_with_flags(command, module, rest)
        from pretrain.compose import load

        rest = _complete(module, rest)
        config = load(command.primary, rest, resumes=reads_run_folder(command, rest))
        code = int(module.main(config) or EXIT_FINISHED)
        note_exit(code)
        return code
    except PretrainError as error:
        _say(f"{type(error).__name__}: {error}")
        note_exit(error.exit_code, error, is_final=error.is_final)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and not _has_reader():
            return EXIT_PIPE_CLOSED
        _say(traceback.format_exc().rstrip())
        note_exit(EXIT_BUG, error)
        return EXIT_BUG


def _say(text: str) -> None:
    print(redact(text, secret_values(os.environ)), file=sys.stderr)


def _has_reader() -> bool:
    """Whether somebody may still read what is printed; in `pretrain ... | head` nobody does."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return not any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _find(arguments: list[str]) -> tuple[Command | None, list[str]]:
    for command in COMMANDS:
        words = command.words.split()
        if arguments[: len(words)] == words:
            return command, arguments[len(words) :]
    return None, arguments


def _complete(module: Any, overrides: list[str]) -> list[str]:
    """The overrides, with those that a command derives from what it is given."""
    return list(module.complete(overrides)) if hasattr(module, "complete") else overrides


def reads_run_folder(command: Command, overrides: list[str]) -> bool:
    """Whether the configuration of a run folder that exists counts, and not that of conf/."""
    from pretrain.compose import names_run

    is_about_run = command.words in ABOUT_A_RUN and names_run(overrides)
    return command.words in RESUMING or is_about_run


def _run_with_flags(command: Command, module: Any, rest: list[str]) -> int:
    """Hydra's own flags: --help, --cfg, --info, --config-dir, completion; and --multirun."""
    from pretrain.compose import freeze, load

    flags = _read_flags(command, rest)
    if flags is None:
        return EXIT_FINISHED
    if flags.multirun:
        from pretrain.multirun import run_jobs

        if others := [text for text in rest if text[0] == "-" and text not in MULTIRUN_FLAGS]:
            raise ConfigError(f"{' '.join(others)} cannot go with --multirun.")
        if hasattr(module, "sweep"):
            return int(module.sweep(flags.overrides))
        return run_jobs(command.words, command.primary, flags.overrides)
    asked = [text for text in rest if text not in flags.overrides]
    is_elsewhere = flags.config_dir or flags.config_name or flags.config_path
    if flags.help and not is_elsewhere:
        return _help(command, flags.overrides)
    if not flags.help:
        flags.overrides = _complete(module, flags.overrides)
    if (flags.cfg or flags.info) and not is_elsewhere:
        # Hydra shows a misspelt key that was added with + as if something read it
        resumes = reads_run_folder(command, flags.overrides)
        config = load(command.primary, flags.overrides, resumes=resumes)
        if flags.cfg == "job" and not flags.package:
            # and it knows nothing of run folders
            print(freeze(config), end="")
            return EXIT_FINISHED
    composed = _compose_by_hydra(command, flags.overrides, asked)
    if composed is None:
        return EXIT_FINISHED
    from pretrain.compose import to_object

    return int(module.main(to_object(composed, "the configuration")) or EXIT_FINISHED)


def _read_flags(command: Command, rest: list[str]) -> Any:
    """Flags and overrides as Hydra's parser reads them; None if it has said all there is to say."""
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.prog = f"pretrain {command.words}"
    try:
        flags, unknown = parser.parse_known_intermixed_args(rest)
    except SystemExit as leaving:
        # it has said why
        if leaving.code:
            raise ConfigError(f"Hydra could not take {' '.join(rest)}.") from None
        return None
    if unknown:
        raise ConfigError(
            f"There is no flag {' '.join(unknown)}: settings are key=value, such as run.steps=400. "
            f"pretrain {command.words} --help shows them, and the flags."
        )
    return flags


def _help(command: Command, overrides: list[str]) -> int:
    from pretrain.compose import compose_to_show
    from pretrain.help import describe

    node, groups = compose_to_show(command.primary, overrides)
    print(describe(command.words, command.purpose, node, groups))
    return EXIT_FINISHED


def _compose_by_hydra(command: Command, overrides: list[str], flags: list[str]) -> Any:
    """What Hydra's entry point composes; None if the flags only asked it to print something."""
    import hydra

    from pretrain.compose import register_schemas
    from pretrain.paths import config_source

    register_schemas()
    found: list[Any] = []
    # flags last: --info takes a word that follows it
    sys.argv = [f"pretrain {command.words}", *overrides, *WITHOUT_OUTPUTS, *flags]
    entry = hydra.main(
        config_path=config_source(), config_name=command.primary, version_base="1.3"
    )(found.append)
    try:
        entry()
    except SystemExit as leaving:
        # it has said why
        if leaving.code:
            raise ConfigError(f"Hydra could not take {' '.join(overrides + flags)}.") from None
    return found[0] if found else None


def _explain(arguments: list[str]) -> int:
    """Show the commands that begin with these words, or all of them."""
    words = [text for text in arguments if text not in ("--help", "-h")]
    first = words[0] if words else ""
    family = [command for command in COMMANDS if command.words.split()[0] == first]
    if len(words) > 1 or (words and not family):
        near = get_close_matches(" ".join(words[:2]), [each.words for each in family or COMMANDS])
        near = near or get_close_matches(first, [each.words for each in COMMANDS])
        hint = f" Did you mean {near[0]}?" if near else ""
        asked = " ".join(words[: 2 if family else 1])
        print(f"There is no command {asked}.{hint}\n", file=sys.stderr)
    is_asked = words != arguments and len(words) <= bool(family)
    print(_usage(family or COMMANDS), file=sys.stdout if is_asked else sys.stderr)
    return EXIT_FINISHED if is_asked else EXIT_CONFIG


def _usage(commands: Sequence[Command]) -> str:
    width = max(len(command.words) for command in commands)
    lines = [f"  pretrain {command.words:<{width}}  {command.purpose}" for command in commands]
    return (
        "usage: pretrain COMMAND [group=option] [key=value] [Hydra flags]\n"
        + "\n".join(lines)
        + "\nEvery setting of a command, with its meaning: pretrain COMMAND --help"
    )
