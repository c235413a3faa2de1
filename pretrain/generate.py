"""The command `pretrain generate`: continue a prompt, thinking as long as it is told to."""

import logging
import sys

import torch

from pretrain.config import GenerateConfig
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import ConfigError
from pretrain.loop.state import check_same_tokenizer
from pretrain.loop.trained import load_trained
from pretrain.model.generation import generate

log = logging.getLogger(__name__)


def main(config: GenerateConfig) -> None:
    """Print the prompt and its continuation, token by token."""
    options = config.generate
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = load_trained(config.run.dir, device)
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
    shown = text = ""
    ids: list[int] = []
    for token in generate(
        trained.model,
        prompt,
        num_steps=options.num_steps,
        max_new_tokens=min(options.max_new_tokens, room),
        temperature=options.temperature,
        top_k=options.top_k or None,
        top_p=options.top_p,
        seed=options.seed,
        stop_ids=[tokenizer.special.end_text, tokenizer.special.end_turn],
    ):
        ids.append(token)
        text = options.prompt + tokenizer.decode(ids)
        # a character may need several tokens: hold back what is not whole yet
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text
    print(text[len(shown) :])
