"""What the model writes at one depth: a batch of prompts at a time."""

from collections.abc import Sequence
from typing import NamedTuple

from pretrain.loop.validation import STATE_SEED
from pretrain.model.decoding import Decoding, Exit
from pretrain.model.generation import generate_rows
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


def decoding(
    subject: Subject,
    depth: int,
    *,
    max_new_tokens: int,
    exit: Exit = Exit.none,
    exit_threshold: float | None = None,
) -> Decoding:
    """How texts are written, greedily, at a depth.

    Raises ConfigError if the exit rule leaves no choice.
    """
    return Decoding(
        num_steps=depth,
        max_new_tokens=min(max_new_tokens, most_new_tokens(subject.context)),
        # a single iteration has nothing to exit from
        exit=exit if depth > 1 else Exit.none,
        exit_threshold=exit_threshold if depth > 1 else None,
        seed=STATE_SEED,
        stop_ids=subject.tokenizer.special.stops(),
    )


def most_new_tokens(context: int) -> int:
    """How many may be asked for: a prompt keeps at least half of the context."""
    return max(context // 2, 1)


def complete(
    subject: Subject,
    prompts: Sequence[Prompt],
    how: Decoding,
    *,
    side_by_side: int,
    name: str,
    numbers: Sequence[int] | None = None,
) -> list[Completion]:
    """What follows each prompt, so many of them side by side.

    All start from the same states, as in `nats_of`, unless `numbers` key states and draws of each.
    """
    texts = subject.tokenizer.encode_batch([prompt.text for prompt in prompts])
    begin, room = subject.tokenizer.special.begin_text, subject.context - how.max_new_tokens - 1
    ids = [[begin, *(text[-room:] if room else [])] for text in texts]
    batches = batches_by_length(
        [len(prompt) for prompt in ids],
        most_tokens=subject.context * side_by_side,
        most_rows=side_by_side,
    )

    def work(batch: Batch) -> list[Completion]:
        written = [_Written(subject, prompts[index]) for index in batch]
        steps = generate_rows(
            subject.model,
            [ids[index] for index in batch],
            how,
            numbers=[0 if numbers is None else numbers[index] for index in batch],
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
        prompt = self._prompt
        before = cut(self._text, prompt.ends, counts_blank=prompt.counts_blank)
        if before is not None:
            self._text, self.is_done = before, True

    def completion(self) -> Completion:
        """What there is of it."""
        return Completion(self._text, len(self._ids), self._steps)
