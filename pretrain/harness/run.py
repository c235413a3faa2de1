"""The command `pretrain harness run`: lm-evaluation-harness's own, with --model recurrent."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

from pretrain.errors import EXIT_CONFIG, EXIT_FINISHED, ConfigError

NAME = "recurrent"
# a string, so that the model is imported when it is asked for
_TARGET = "pretrain.harness.model:RecurrentLM"


def main(arguments: Sequence[str]) -> int:
    """What `lm-eval run` does with these arguments; its exit code.

    Raises ConfigError if lm-evaluation-harness is not installed.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "lm-evaluation-harness is not installed beside this interpreter. `make harness` makes "
            "an environment that has it: .venv-harness/bin/pretrain harness run ...; elsewhere "
            "install the extra: pip install 'pretrain[harness]'."
        )
    from lm_eval.__main__ import cli_evaluate

    register()
    sys.argv = ["lm-eval", "run", *arguments]
    try:
        cli_evaluate()
    except SystemExit as leaving:
        # argparse has said why
        return EXIT_CONFIG if leaving.code else EXIT_FINISHED
    return EXIT_FINISHED


def register() -> None:
    """Let lm_eval know the model by its name; harmless to call again."""
    from lm_eval.api.registry import model_registry

    # it looks for its own models only while it knows none
    import_module("lm_eval.models")

    if NAME not in model_registry:
        model_registry.register(NAME, target=_TARGET)
