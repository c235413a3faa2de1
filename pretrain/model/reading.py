"""New tokens of a batch on their way through the model, behind those that a cache holds."""

# B rows  A rows that still iterate  T new tokens  D width  V vocabulary

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pretrain.model.cache import KeyValueCache, Span
from pretrain.model.decoding import Decoding, Exit, StateStart
from pretrain.model.exits import Watch
from pretrain.model.graph import Runner
from pretrain.model.initial_state import state_keys, states_at
from pretrain.model.keyed import Keys
from pretrain.model.recurrent import RecurrentModel

# Tokens whose initial states are drawn at once: bounds the temporaries to about 0.5 GiB.
_DRAWN_TOKENS = 4096


@dataclass
class Reading:
    """Some tokens between two iterations."""

    model: RecurrentModel
    runner: Runner
    span: Span
    embedded_ATD: Tensor
    state_ATD: Tensor
    iterations: int = 0

    def iterate(self, until: int) -> None:
        """Run the core until so many iterations are done."""
        first = self.iterations

        def run(span: Span, embedded_ATD: Tensor, state_ATD: Tensor) -> tuple[Tensor]:
            for iteration in range(first, until):
                state_ATD = self.model.core.iteration(
                    state_ATD, embedded_ATD, span.layout, span, iteration
                )
            return (state_ATD,)

        inputs = (self.embedded_ATD, self.state_ATD)
        (self.state_ATD,) = self.runner.run(("core", first, until), run, self.span, *inputs)
        self.iterations = until

    def subset(self, rows: Sequence[int]) -> "Reading":
        """Some of the rows, ascending."""
        if len(rows) == len(self.state_ATD):
            return self
        index_A = torch.tensor(rows, device=self.state_ATD.device)
        return replace(
            self,
            span=self.span.rows(index_A),
            embedded_ATD=self.embedded_ATD[index_A],
            state_ATD=self.state_ATD[index_A],
        )

    def decode(self) -> tuple[Tensor, Tensor]:
        """The latent and what the head sees, [A, T, D] each."""

        def run(span: Span, state_ATD: Tensor) -> tuple[Tensor, ...]:
            return self.model.decode(state_ATD, span.layout, span)

        latent_ATD, hidden_ATD = self.runner.run("coda", run, self.span, self.state_ATD)
        return latent_ATD, hidden_ATD

    def logits(self) -> Tensor:
        """Of every token, float32 [A, T, V]."""
        logits_ATV: Tensor = self.model.embedding(None, self.decode()[1])
        return logits_ATV


class Decoder:
    """Reads tokens of B rows in turn and gives the logits of the next one."""

    def __init__(
        self,
        model: RecurrentModel,
        options: Decoding,
        *,
        rows: int,
        capacity: int,
        is_graphed: bool | None = None,
        numbers: Sequence[int] | None = None,
    ) -> None:
        """`capacity`: tokens of the longest row. On a GPU, what follows the prompts runs in CUDA
        graphs, unless `is_graphed` is False. `numbers` key the draws of the rows; None: their
        place in the batch.
        """
        self.model = model
        self.options = options
        self.device = model.embedding.weight.device
        self.rows = list(range(rows))
        """The row of the batch that stands at each place."""
        self.steps = [0] * rows
        """Iterations that the last token read has got, by place."""
        self._numbers = self.rows if numbers is None else list(numbers)
        self.cache = KeyValueCache(
            model.config,
            rows=rows,
            capacity=capacity,
            iterations=options.most_steps,
            cache_iterations=options.cache_iterations,
        )
        is_gpu = self.device.type == "cuda"
        self.runner = Runner(is_gpu if is_graphed is None else is_graphed)
        self._keys = self._state_keys()
        self._latent_B1D: Tensor | None = None

    @torch.no_grad()
    def read(
        self,
        tokens_BT: Tensor,
        *,
        counts: Sequence[int] | None = None,
        num_steps: int | None = None,
    ) -> Tensor:
        """Float32 logits [B, V] of the token after the given ones.

        counts: of each row only so many tokens count, what follows is padding; num_steps: in
        place of the options'. Only single tokens behind a prompt exit before.
        """
        limit = num_steps or self.options.num_steps
        is_single = tokens_BT.shape[1] == 1 and min(self.cache.lengths) > 0
        self.steps = [limit] * len(self.rows)
        if is_single and self.options.exit is not Exit.none:
            logits_BV = self._read_until_exit(self.begin(tokens_BT), limit)
        else:
            logits_BV = self._read_all(self.begin(tokens_BT), limit, counts)
        self.cache.advance(counts or [tokens_BT.shape[1]] * len(self.rows))
        return logits_BV

    def begin(self, tokens_BT: Tensor) -> Reading:
        """The tokens before their first iteration; who goes on by hand advances the cache too."""

        def run(
            span: Span, tokens_BT: Tensor, latent_B1D: Tensor | None = None
        ) -> tuple[Tensor, Tensor]:
            embedded_BTD = self.model.embed(tokens_BT, span.layout, span)
            return embedded_BTD, self._start(span, latent_B1D).to(embedded_BTD.dtype)

        span = self.cache.span(tokens_BT.shape[1], self.device)
        is_warm = self.options.start is StateStart.warm and self._latent_B1D is not None
        inputs = (tokens_BT, self._latent_B1D) if is_warm else (tokens_BT,)
        embedded_BTD, state_BTD = self.runner.run("prelude", run, span, *inputs)
        return Reading(self.model, self.runner, span, embedded_BTD, state_BTD)

    def keep(self, alive: Sequence[int]) -> list[int]:
        """Forget all rows but those at these places; the old place of each that is left."""
        if len(alive) == len(self.rows):
            return list(alive)
        # Holes are filled from behind, so that few rows of the cache move.
        movers = iter(sorted(place for place in alive if place >= len(alive)))
        stayers = {place for place in alive if place < len(alive)}
        order = [place if place in stayers else next(movers) for place in range(len(alive))]
        self.cache.keep(order)
        self.rows = [self.rows[place] for place in order]
        self._keys = self._state_keys()
        self.runner.forget()
        if self._latent_B1D is not None:
            self._latent_B1D = self._latent_B1D[order]
        return order

    @property
    def numbers(self) -> list[int]:
        """What keys the draws of the row at each place."""
        return [self._numbers[row] for row in self.rows]

    def _state_keys(self) -> Keys:
        return state_keys(
            self.numbers,
            seed=self.options.seed,
            context=self.cache.capacity,
            width=self.model.config.width,
            device=self.device,
        )

    def _start(self, span: Span, latent_B1D: Tensor | None) -> Tensor:
        config = self.model.config
        rows, tokens = span.positions_AT.shape
        if self.options.start is StateStart.random:
            # A few rows of a prompt at a time: the draws are float64.
            at_once = max(_DRAWN_TOKENS // tokens, 1)
            parts = zip(*(x.split(at_once) for x in (span.positions_AT, *self._keys)), strict=True)
            states = [
                states_at(
                    positions_BT, (first_B, second_B), width=config.width, sigma=config.state_sigma
                )
                for positions_BT, first_B, second_B in parts
            ]
            return torch.cat(states)
        if latent_B1D is not None:
            return latent_B1D.expand(-1, tokens, -1)
        return torch.zeros(rows, tokens, config.width, device=self.device)

    def _read_all(self, reading: Reading, limit: int, counts: Sequence[int] | None) -> Tensor:
        reading.iterate(limit)
        reading.span.fill(limit)
        latent_BTD, hidden_BTD = reading.decode()
        if counts is not None:
            last_B = torch.tensor(counts, device=self.device) - 1
            index_B1D = last_B[:, None, None].expand(-1, 1, hidden_BTD.shape[-1])
            latent_BTD, hidden_BTD = (
                latent_BTD.gather(1, index_B1D),
                hidden_BTD.gather(1, index_B1D),
            )
        self._latent_B1D = latent_BTD[:, -1:]
        # Only the last token's logits are wanted: a prompt's would fill memory.
        logits_B1V: Tensor = self.model.embedding(None, hidden_BTD[:, -1:])
        return logits_B1V[:, 0]

    def _read_until_exit(self, whole: Reading, limit: int) -> Tensor:
        """Rows leave one by one and cost nothing afterwards."""
        options, reading = self.options, whole
        watch = Watch(options.exit, reading.state_ATD, self.model.config.vocabulary_size)
        ended = _Ended(whole, self.model.config.vocabulary_size)
        # The check before min_steps is what the first decisive one compares with.
        first = max((options.min_steps - 1) // options.check_every, 1) * options.check_every
        for check in range(first, limit, options.check_every):
            reading.iterate(check)
            here_AV = reading.logits()[:, -1] if options.exit.needs_logits else None
            values_A = watch.values(reading.state_ATD, here_AV)
            is_out = watch.is_enough(values_A, options.threshold).tolist()
            if check < options.min_steps or not any(is_out):
                continue
            ended.take(reading, [row for row, out in enumerate(is_out) if out], here_AV)
            stay = [row for row, out in enumerate(is_out) if not out]
            if not stay:
                break
            reading = reading.subset(stay)
            watch.keep(stay)
        else:
            reading.iterate(limit)
            ended.take(reading, range(len(reading.state_ATD)))
        self.steps = ended.steps
        self._latent_B1D = self.model.final_norm(ended.whole.state_ATD)
        return ended.logits()


class _Ended:
    """What the rows of one token ended with, each after its own iterations."""

    def __init__(self, whole: Reading, vocabulary_size: int) -> None:
        rows = len(whole.state_ATD)
        self.whole = replace(whole, state_ATD=torch.empty_like(whole.state_ATD))
        self.steps = [0] * rows
        self._places = list(range(rows))
        dtype = torch.promote_types(whole.state_ATD.dtype, torch.float32)
        self._logits_BV = whole.state_ATD.new_empty(rows, vocabulary_size, dtype=dtype)
        self._undecoded = set(range(rows))

    def take(self, reading: Reading, out: Sequence[int], logits_AV: Tensor | None = None) -> None:
        """Rows of a reading that go no further, with their logits if these are known."""
        leaving = reading.subset(out)
        leaving.span.fill(reading.iterations)
        places = [self._places[row] for row in out]
        self.whole.state_ATD[places] = leaving.state_ATD
        for place in places:
            self.steps[place] = reading.iterations
        if logits_AV is not None:
            self._logits_BV[places] = logits_AV[out]
            self._undecoded -= set(places)
        self._places = [place for place in self._places if place not in places]

    def logits(self) -> Tensor:
        """Of all rows, [B, V]; those that were not decoded yet are so together."""
        if self._undecoded:
            places = sorted(self._undecoded)
            self._logits_BV[places] = self.whole.subset(places).logits()[:, -1]
        return self._logits_BV
