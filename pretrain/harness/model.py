"""A run as a model of lm-evaluation-harness; only `pretrain.harness.run` names it."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from torch import Tensor

from pretrain.compose import thaw
from pretrain.data.tokenizer import Tokenizer
from pretrain.engine.config import Device
from pretrain.engine.world import World, join
from pretrain.harness.config import ModelOptions, model_options
from pretrain.harness.wishes import Sampling, read_wish
from pretrain.loop.state import check_same_tokenizer
from pretrain.loop.trained import Trained, load_trained
from pretrain.model.decoding import Decoding, Exit
from pretrain.tasks.completions import complete, decoding
from pretrain.tasks.likelihood import (
    Row,
    Subject,
    continuation_row,
    greedy_nats_of,
    nats_of,
    text_rows,
)
from pretrain.tasks.prompts import Continuation, Prompt

log = logging.getLogger(__name__)

_DEFAULT_SIDE_BY_SIDE = 16


class RecurrentLM(LM):
    """What `pretrain evaluate` measures, asked by lm-evaluation-harness.

    Likelihoods, windows over long texts and start states are those of `pretrain.tasks`: context
    and continuation are encoded as one text, and what is scored begins at the first id that
    differs from those of the context alone. Under torchrun or srun every rank has a model and
    answers the requests that lm-evaluation-harness deals to it.
    """

    def __init__(self, **given: Any) -> None:
        """Raises ConfigError, CheckpointError or DataError for what does not fit together."""
        super().__init__()
        self.options = model_options(given)
        self.world = _join(self.options, given.get("device"))
        self._rank, self._world_size = self.world.rank, self.world.size
        self._device = self.world.device
        self.trained = load_trained(
            self.options.run_dir, self.world.device, step=self.options.checkpoint
        )
        self.subject = _subject(self.trained, self.options, self.world)

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Of each continuation, and whether it is what greedy decoding would write."""
        self._say_that_likelihoods_never_exit()
        rows = [
            continuation_row(
                self.subject.tokenizer, Continuation(*request.args), self.subject.context
            )
            for request in requests
        ]
        _warn_of_cut([row.is_cut for row in rows], "texts")
        found = greedy_nats_of(self.subject, rows, "likelihood")
        return [(-nats, is_greedy) for nats, is_greedy in found]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of each text as a whole, every token scored once, from half a context or more."""
        self._say_that_likelihoods_never_exit()
        windows: list[list[Row]] = [
            text_rows(self.subject.tokenizer, text, self.subject.context)
            for (text,) in (request.args for request in requests)
        ]
        found = iter(nats_of(self.subject, [row for rows in windows for row in rows], "text"))
        return [-sum(next(found)[0] for _ in rows) for rows in windows]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to the first of the strings that end it."""
        wishes = [read_wish(request.args[1]) for request in requests]
        groups: dict[Sampling, list[int]] = {}
        for index, wish in enumerate(wishes):
            groups.setdefault(wish.sampling, []).append(index)
        numbers = _numbers(requests)
        texts = [""] * len(requests)
        for sampling, indices in groups.items():
            prompts = [
                Prompt(requests[index].args[0], wishes[index].until, counts_blank=True)
                for index in indices
            ]
            written = complete(
                self.subject,
                prompts,
                self._decoding(sampling),
                side_by_side=self.options.batch_size or _DEFAULT_SIDE_BY_SIDE,
                name="text",
                numbers=[numbers[index] for index in indices] if sampling.temperature else None,
            )
            _warn_of_cut([completion.is_cut for completion in written], "prompts")
            for index, completion in zip(indices, written, strict=True):
                texts[index] = completion.text
        return texts

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, one behind the other."""
        parts = self.world.gather_objects(tensor.cpu())
        return torch.cat([part.reshape(-1) for part in parts])

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Every rank's object, on one rank."""
        parts = self.world.gather_objects(obj)
        return parts if self.world.rank == dst else None

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.world.barrier()

    def get_model_info(self) -> dict[str, Any]:
        """What the results say of the model beside its arguments."""
        state = self.trained.state
        return {
            "step": self.trained.step,
            "num_steps": self.options.num_steps,
            "exit": self.options.exit.value,
            "model_dtype": str(self.trained.dtype).removeprefix("torch."),
            "model_num_parameters": sum(p.numel() for p in self.trained.model.parameters()),
            "tokenizer_sha256": self.subject.tokenizer.sha256,
            "data_fingerprint": state.get("data_fingerprint"),
        }

    def _decoding(self, sampling: Sampling) -> Decoding:
        how = decoding(
            self.subject,
            self.options.num_steps,
            max_new_tokens=sampling.max_new_tokens,
            exit=self.options.exit,
            exit_threshold=self.options.exit_threshold,
        )
        if how.max_new_tokens < sampling.max_new_tokens:
            log.warning(
                "the context of %d has room for %d new tokens, not the %d that are asked for",
                self.subject.context,
                how.max_new_tokens,
                sampling.max_new_tokens,
            )
        return dataclasses.replace(
            how, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
        )

    def _say_that_likelihoods_never_exit(self) -> None:
        if self.options.exit is not Exit.none:
            log.warning(
                "exit=%s is for text that is written; likelihoods run all %d iterations",
                self.options.exit.value,
                self.options.num_steps,
            )


def _join(options: ModelOptions, asked: Any) -> World:
    # where the run was trained says nothing about where it is measured
    engine = dataclasses.replace(thaw(Path(options.run_dir)).engine, device=options.device)
    world = join(engine)
    if options.device is Device.auto and asked is not None and world.device.type == "cpu":
        log.warning("--device %s: torch sees no GPU, so this is measured on the CPU", asked)
    return world


def _subject(trained: Trained, options: ModelOptions, world: World) -> Subject:
    tokenizer = Tokenizer.load(trained.config.tokenizer.path)
    check_same_tokenizer(trained.state, tokenizer.sha256, trained.config.tokenizer.path)
    return Subject(
        model=trained.model,
        tokenizer=tokenizer,
        # lm-evaluation-harness has dealt the requests already
        world=World(0, 1, 0, world.device),
        depths=(options.num_steps,),
        batch_tokens=(options.batch_size or trained.config.batch.micro_rows)
        * trained.config.model.context,
    )


def _numbers(requests: Sequence[Instance]) -> list[int]:
    """Keys of each request's draws, the same on any number of ranks: its item and repetition."""
    seen: Counter[int] = Counter()
    numbers = []
    for request in requests:
        number = (request.doc_id or 0) * (request.repeats or 1) + seen[id(request)]
        seen[id(request)] += 1
        numbers.append(number)
    return numbers


def _warn_of_cut(flags: Sequence[bool], what: str) -> None:
    if count := sum(flags):
        log.warning(
            "%d of %d %s do not fit into the context; their beginnings were left out",
            count,
            len(flags),
            what,
        )
