"""The command `pretrain generate`: continue a prompt, thinking as long as it is told to."""

import logging
import sys
import time
from collections.abc import Iterator

import torch

from pretrain.config import GenerateConfig
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import ConfigError
from pretrain.loop.state import check_same_tokenizer
from pretrain.loop.trained import check_is_here, load_trained
from pretrain.model.decoding import Decoding
from pretrain.model.generation import Chosen, generate
from pretrain.model.recurrent import RecurrentModel
from pretrain.model.speculative import speculate_rows

log = logging.getLogger(__name__)


def main(config: GenerateConfig) -> None:
    """Print the prompt and its continuation, token by token."""
    options = config.generate
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = load_trained(config.run.dir, device, step=options.step)
    check_is_here(config.run.dir, "tokenizer.path", trained.config.tokenizer.path)
    tokenizer = Tokenizer.load(trained.config.tokenizer.path)
    check_same_tokenizer(trained.state, tokenizer.sha256, trained.config.tokenizer.path)
    prompt = [tokenizer.special.begin_text, *tokenizer.encode(options.prompt)]
    room = trained.config.model.context - len(prompt)
    if room < 1:
        raise ConfigError(
            f"generate.prompt has {len(prompt)} tokens, which leaves no room in a context of "
            f"{trained.config.model.context}. Shorten the prompt."
        )
    if room < options.max_new_tokens:
        log.warning(
            "the context of %d has room for %d new tokens, not generate.max_new_tokens=%d",
            trained.config.model.context,
            room,
            options.max_new_tokens,
        )
    decoding = options.decoding(tokenizer.special.stops(), room)
    ids: list[int] = []
    steps: list[int] = []
    shown = text = ""
    started = time.perf_counter()
    for chosen in _tokens(trained.model, prompt, decoding):
        ids.append(chosen.token)
        steps.append(chosen.steps)
        text = options.prompt + tokenizer.decode(ids)
        # a character may need several tokens: hold back what is not whole yet
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text
    print(text[len(shown) :])
    log.info(
        "%d tokens, %.1f iterations each (%d to %d), %.1f tokens/s",
        len(ids),
        sum(steps) / len(steps),
        min(steps),
        max(steps),
        len(ids) / (time.perf_counter() - started),
    )


def _tokens(model: RecurrentModel, prompt: list[int], options: Decoding) -> Iterator[Chosen]:
    if options.draft_steps is None:
        yield from generate(model, prompt, options)
        return
    drafted = accepted = 0
    for each in speculate_rows(model, [prompt], options):
        drafted, accepted = drafted + each.drafted, accepted + each.accepted
        yield from each.chosen[0]
    log.info("%d of %d drafted tokens were accepted", accepted, drafted)
