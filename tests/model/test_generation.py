"""Generation equals reading the whole text again for every token, and sampling follows its law."""

import math

import pytest
import torch

from pretrain.errors import ConfigError
from pretrain.model.depth import Depth
from pretrain.model.generation import (
    Decoder,
    Decoding,
    StateStart,
    collect,
    generate,
    generate_rows,
    sample,
)
from pretrain.model.initial_state import initial_states

PROMPTS = [[3, 1, 4, 1], [5, 9, 2, 6]]


def run(model, prompts, **options: object) -> list[list[int]]:
    return collect(generate_rows(model, prompts, Decoding(**options)))


def test_cached_decoding_equals_recomputation(make_model):
    model = make_model()
    text = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8, 2, 8, 1]])
    state = initial_states(range(2), seed=4, context=7, width=16)
    whole = model(text, [Depth(3, 0)] * 2, initial_state=state).logits
    decoder = Decoder(model, num_steps=3, capacity=7, seed=4)
    # A prompt, a chunk of several tokens, single tokens.
    for start, stop in ((0, 3), (3, 5), (5, 6), (6, 7)):
        found = decoder.read(text[:, start:stop])
        torch.testing.assert_close(found, whole[:, stop - 1], atol=1e-11, rtol=0.0)


def test_greedy_tokens_are_the_likeliest_ones(make_model):
    model = make_model()
    options = {"num_steps": 2, "max_new_tokens": 5, "start": StateStart.zeros}
    rows = run(model, PROMPTS, **options)
    for prompt, new in zip(PROMPTS, rows, strict=True):
        text = torch.tensor([prompt + new])
        zeros = torch.zeros(1, len(text[0]), 16)
        logits = model(text, [Depth(2, 0)], initial_state=zeros).logits
        assert logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == new


def test_a_row_of_sampled_text_depends_on_its_seed_and_not_on_later_rows(make_model):
    model = make_model()
    options = {"num_steps": 2, "max_new_tokens": 8, "temperature": 1.0}
    both = run(model, PROMPTS, seed=3, **options)
    assert both == run(model, PROMPTS, seed=3, **options)
    assert both[:1] == run(model, PROMPTS[:1], seed=3, **options)
    assert both != run(model, PROMPTS, seed=4, **options)


def test_every_token_has_a_draw_of_its_own(make_model):
    model = make_model()
    # So hot that every rank among the 32 tokens is equally likely.
    new = run(model, PROMPTS[:1], num_steps=2, max_new_tokens=10, temperature=1e9, seed=1)[0]
    text = torch.tensor([PROMPTS[0] + new])
    state = initial_states([0], seed=1, context=14, width=16)
    logits = model(text, [Depth(2, 0)], initial_state=state).logits[0, 3:-1]
    chosen = logits.gather(1, torch.tensor(new)[:, None])
    ranks = (logits > chosen).sum(1)
    # Ten draws from 32 ranks: fewer than 5 different ones has a probability below 1e-4.
    assert len(ranks.unique()) >= 5


def test_the_start_of_the_state_matters(make_model):
    model = make_model()
    decoders = [Decoder(model, num_steps=2, capacity=5, start=start) for start in StateStart]
    first = [decoder.read(torch.tensor(PROMPTS)) for decoder in decoders]
    random, zeros, warm = (decoder.read(torch.tensor([[1], [1]])) for decoder in decoders)
    assert torch.equal(first[1], first[2])
    assert not torch.equal(first[0], first[1])
    assert not torch.allclose(zeros, warm)
    assert not torch.allclose(zeros, random)


def test_a_row_ends_at_its_stop_id(make_model):
    model = make_model()
    options = {"num_steps": 2, "max_new_tokens": 6, "start": StateStart.zeros}
    free = run(model, PROMPTS, **options)
    stop = free[0][2]
    cut = run(model, PROMPTS, stop_ids=[stop], **options)
    for whole, row in zip(free, cut, strict=True):
        length = whole.index(stop) + 1 if stop in whole else len(whole)
        assert row == whole[:length]
    assert len(cut[0]) <= 3


def test_one_prompt_streams_its_row(make_model):
    model = make_model()
    options = {"num_steps": 2, "max_new_tokens": 6, "temperature": 0.8, "top_k": 9, "seed": 2}
    (row,) = run(model, PROMPTS[:1], **options)
    assert list(generate(model, PROMPTS[0], **options)) == row
    assert len(row) == 6
    with pytest.raises(ConfigError, match="top_k=0"):
        generate(model, PROMPTS[0], **{**options, "top_k": 0})


# Probabilities 0.5, 0.3, 0.15, 0.05, not in order of id.
LOGITS = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.15, 0.5, 0.05, 0.3]),
        ({"top_k": 2}, [0.0, 0.625, 0.0, 0.375]),
        ({"top_k": 9}, [0.15, 0.5, 0.05, 0.3]),
        ({"top_p": 0.6}, [0.0, 0.625, 0.0, 0.375]),
        ({"top_p": 0.01}, [0.0, 1.0, 0.0, 0.0]),
        ({"top_p": 1.0}, [0.15, 0.5, 0.05, 0.3]),
        # Of the three kept, renormalised to 0.526, 0.316, 0.158, two reach 0.8.
        ({"top_k": 3, "top_p": 0.8}, [0.0, 0.625, 0.0, 0.375]),
        # Squared and renormalised.
        ({"temperature": 0.5}, [0.0225 / 0.365, 0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365]),
    ],
)
def test_samples_follow_the_filtered_distribution(options, expected):
    draws = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    tokens = sample(LOGITS.expand(10_000, 4), draws, **{"temperature": 1.0, **options})
    found = tokens.bincount(minlength=4) / 10_000
    # Evenly spaced draws invert the CDF to within one draw at each edge.
    torch.testing.assert_close(found, torch.tensor(expected), atol=2e-4, rtol=0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": [[1], [1, 2]]}, "all of one length"),
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": [[]]}, "none empty"),
        ({"prompts": [[1, 32]]}, "vocabulary of 32"),
        ({"prompts": [[-1]]}, "vocabulary of 32"),
        ({"max_new_tokens": 13}, "= 17 exceed model.context=16"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"num_steps": 0}, "at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(make_model, changes, message):
    options = {"prompts": PROMPTS, "num_steps": 2, "max_new_tokens": 2, **changes}
    prompts = options.pop("prompts")
    with pytest.raises(ConfigError, match=message):
        generate_rows(make_model(), prompts, Decoding(**options))
