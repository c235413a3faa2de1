"""What the model writes, greedily, at one depth: a batch of prompts at a time."""

from collections.abc import Sequence
from typing import NamedTuple

from pretrain.loop.validation import STATE_SEED
from pretrain.model.decoding import Decoding, Exit
from pretrain.model.generation import generate_rows
from pretrain.tasks.config import EvaluateOptions
from pretrain.tasks.likelihood import Subject
from pretrain.tasks.prompts import Prompt, cut
from pretrain.tasks.sharing import Batch, batches_by_length, share


class Completion(NamedTuple):
    """What the model wrote."""

    text: str
    """Without what follows the first end."""
    tokens: int
    """How many it wrote until all of it was there."""
    steps: int
    """Iterations of the core that chose them, all together."""
    is_cut: bool = False
    """Whether the prompt's beginning did not fit into the context."""


def decoding(subject: Subject, options: EvaluateOptions, depth: int) -> Decoding:
    """How texts are written at a depth. Raises ConfigError if the exit rule leaves no choice."""
    return Decoding(
        num_steps=depth,
        # a prompt keeps at least half of the context
        max_new_tokens=min(options.max_new_tokens, max(subject.context // 2, 1)),
        # a single iteration has nothing to exit from
        exit=options.exit if depth > 1 else Exit.none,
        exit_threshold=options.exit_threshold if depth > 1 else None,
        seed=STATE_SEED,
        stop_ids=subject.tokenizer.special.stops(),
    )


def complete(
    subject: Subject, prompts: Sequence[Prompt], options: EvaluateOptions, depth: int, name: str
) -> list[Completion]:
    """What follows each prompt at this depth; all start from the same states, as in `nats_of`."""
    how = decoding(subject, options, depth)
    texts = subject.tokenizer.encode_batch([prompt.text for prompt in prompts])
    begin, room = subject.tokenizer.special.begin_text, subject.context - how.max_new_tokens - 1
    ids = [[begin, *(text[-room:] if room else [])] for text in texts]
    batches = batches_by_length(
        [len(prompt) for prompt in ids],
        most_tokens=subject.context * options.generate_rows,
        most_rows=options.generate_rows,
    )

    def work(batch: Batch) -> list[Completion]:
        written = [_Written(subject, prompts[index]) for index in batch]
        steps = generate_rows(
            subject.model, [ids[index] for index in batch], how, numbers=[0] * len(batch)
        )
        for chosen in steps:
            for row, token in zip(written, chosen, strict=True):
                if token is not None:
                    row.add(token.token, token.steps)
            # rows that have met a stop id get no more tokens
            if all(
                row.is_done or token is None for row, token in zip(written, chosen, strict=True)
            ):
                break
        return [row.completion() for row in written]

    found = share(subject.world, name, batches, work)
    return [
        completion._replace(is_cut=len(text) > room)
        for completion, text in zip(found, texts, strict=True)
    ]


class _Written:
    """The text of one row while it grows."""

    def __init__(self, subject: Subject, prompt: Prompt) -> None:
        self._tokenizer, self._prompt = subject.tokenizer, prompt
        self._ids: list[int] = []
        self._steps = 0
        self._text = ""
        self.is_done = False

    def add(self, token: int, steps: int) -> None:
        """One more token; none counts behind the first end, so that other rows change nothing."""
        if self.is_done:
            return
        self._ids.append(token)
        self._steps += steps
        self._text = self._tokenizer.decode(self._ids)
        if (before := cut(self._text, self._prompt.ends)) is not None:
            self._text, self.is_done = before, True

    def completion(self) -> Completion:
        """What there is of it."""
        return Completion(self._text, len(self._ids), self._steps)
