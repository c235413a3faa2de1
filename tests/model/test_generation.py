"""Generation equals reading the whole text again for every token, whatever the depths."""

import math

import pytest
import torch

from pretrain.errors import ConfigError
from pretrain.model.decoding import Decoding, Exit, StateStart
from pretrain.model.depth import Depth
from pretrain.model.generation import Decoder, collect, generate, generate_rows
from pretrain.model.initial_state import initial_states
from text_oracle import PROMPTS, UNEVEN, count_core_tokens, naive_logits


def run(model, prompts, **options: object) -> list[list[int]]:
    return collect(generate_rows(model, prompts, Decoding(**options)))


def run_steps(model, prompts, **options: object) -> tuple[list[list[int]], list[list[int]]]:
    """New tokens and the iterations that chose each, by row."""
    found = list(generate_rows(model, prompts, Decoding(**options)))
    rows = zip(*found, strict=True)
    return collect(found), [[each.steps for each in row if each is not None] for row in rows]


def check_tokens(model, prompts, rows, steps):
    """Every token is the likeliest after the ones before, each at the depth it was read with."""
    for prompt, new, chosen_by in zip(prompts, rows, steps, strict=True):
        depths = [chosen_by[0]] * len(prompt) + chosen_by[1:]
        logits = naive_logits(model, [*prompt, *new[:-1]], depths)
        assert logits[len(prompt) - 1 :].argmax(-1).tolist() == new


def test_cached_decoding_equals_recomputation(make_model):
    model = make_model()
    text = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8, 2, 8, 1]])
    state = initial_states(range(2), seed=4, context=7, width=16)
    whole = model(text, [Depth(3, 0)] * 2, initial_state=state).logits
    decoder = Decoder(model, Decoding(num_steps=3, max_new_tokens=1, seed=4), rows=2, capacity=7)
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
    decoders = [
        Decoder(model, Decoding(num_steps=2, max_new_tokens=1, start=start), rows=2, capacity=5)
        for start in StateStart
    ]
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
    assert [token for token, _ in generate(model, PROMPTS[0], Decoding(**options))] == row
    assert len(row) == 6


@pytest.mark.parametrize("start", list(StateStart))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_depends_neither_on_the_other_prompts_nor_on_their_lengths(
    make_model, start, temperature
):
    model = make_model()
    options = {"num_steps": 3, "max_new_tokens": 6, "start": start, "temperature": temperature}
    batch = run(model, UNEVEN, **options)
    for row, prompt in enumerate(UNEVEN):
        # At its own place among prompts of its own length: even rows take another path.
        others = [prompt[:1] * len(prompt)] * len(UNEVEN)
        others[row] = prompt
        assert run(model, others, **options)[row] == batch[row]


def test_prompts_of_unequal_length_are_each_continued_greedily(make_model):
    model = make_model()
    rows, steps = run_steps(model, UNEVEN, num_steps=3, max_new_tokens=6, start=StateStart.zeros)
    assert steps == [[3] * 6] * len(UNEVEN)
    check_tokens(model, UNEVEN, rows, steps)


@pytest.mark.parametrize("prompts", [PROMPTS, UNEVEN])
def test_every_token_may_have_a_depth_of_its_own(make_model, prompts):
    model = make_model()
    # Deeper than the prompt, shallower, and as deep: later ones see the deepest entry there is.
    rows, steps = run_steps(
        model,
        prompts,
        num_steps=3,
        schedule=(6, 1, 4, 2),
        max_new_tokens=7,
        start=StateStart.zeros,
    )
    assert steps == [[3, 6, 1, 4, 2, 3, 3]] * len(prompts)
    check_tokens(model, prompts, rows, steps)


# Thresholds between the values that occur, so that tokens leave at different iterations.
THRESHOLDS = {
    Exit.kl: 1e-3,
    Exit.minp_kl: 1e-3,
    Exit.entropy_diff: 1e-3,
    Exit.latent_diff: 0.1,
    Exit.cosine: 0.005,
    Exit.argmax_stability: 2,
}


@pytest.mark.parametrize("exit", list(THRESHOLDS))
def test_rows_leave_on_their_own_and_cost_nothing_afterwards(make_model, exit):
    model = make_model()
    options = {
        "num_steps": 12,
        "max_new_tokens": 6,
        "exit": exit,
        "exit_threshold": THRESHOLDS[exit],
        "start": StateStart.zeros,
    }
    with count_core_tokens(model) as counted:
        rows, steps = run_steps(model, UNEVEN, **options)
    # Tokens of the batch, padding of the prompts included, times their iterations.
    prompt_work = 12 * len(UNEVEN) * max(map(len, UNEVEN))
    assert sum(counted) == prompt_work + sum(sum(row[1:]) for row in steps)
    assert any(len(set(column)) > 1 for column in zip(*steps, strict=True))
    check_tokens(model, UNEVEN, rows, steps)
    for row, prompt in enumerate(UNEVEN):
        alone, alone_steps = run_steps(model, [prompt], **options)
        assert (alone[0], alone_steps[0]) == (rows[row], steps[row])


def test_the_warm_start_of_a_row_that_left_is_its_own_last_latent(make_model):
    model = make_model()
    options = {
        "num_steps": 12,
        "max_new_tokens": 6,
        "exit": Exit.latent_diff,
        "exit_threshold": 0.1,
        "start": StateStart.warm,
    }
    rows, steps = run_steps(model, UNEVEN, **options)
    assert len({tuple(row) for row in steps}) > 1
    for row, prompt in enumerate(UNEVEN):
        alone, alone_steps = run_steps(model, [prompt], **options)
        assert (alone[0], alone_steps[0]) == (rows[row], steps[row])


def test_tokens_leave_at_checks_from_min_steps_on_only(make_model):
    model = make_model()
    options = {"num_steps": 11, "max_new_tokens": 8, "exit": Exit.kl, "exit_threshold": 100.0}
    assert run_steps(model, PROMPTS, **options)[1] == [[11] + [1] * 7] * 2
    for min_steps, check_every, expected in ((4, 1, 4), (4, 3, 6), (1, 4, 4), (9, 4, 11)):
        _, steps = run_steps(
            model, PROMPTS, **options, min_steps=min_steps, check_every=check_every
        )
        assert {step for row in steps for step in row[1:]} == {expected}


def test_rows_that_have_ended_cost_nothing(make_model):
    model = make_model()
    options = {"num_steps": 3, "max_new_tokens": 8, "start": StateStart.zeros}
    free = run(model, UNEVEN, **options)
    stops = [free[0][1], free[2][4]]
    with count_core_tokens(model) as counted:
        rows = run(model, UNEVEN, stop_ids=stops, **options)
    for whole, cut in zip(free, rows, strict=True):
        ends = [at for at, token in enumerate(whole) if token in stops]
        assert cut == whole[: ends[0] + 1 if ends else None]
    assert len({len(row) for row in rows}) > 1
    # The last token of a row is not read, whether it is a stop id or the last allowed.
    read = len(UNEVEN) * max(map(len, UNEVEN)) + sum(len(row) - 1 for row in rows)
    assert sum(counted) == 3 * read


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": [[]]}, "none empty"),
        ({"prompts": [[1, 32]]}, "vocabulary of 32"),
        ({"prompts": [[-1]]}, "vocabulary of 32"),
        ({"prompts": [[1], [1] * 15]}, "15 prompt tokens .* = 17 exceed"),
        ({"max_new_tokens": 13}, "= 17 exceed model.context=16"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"num_steps": 0}, "num_steps=0 must be at least 1"),
        ({"num_steps": -3}, "num_steps=-3 must be at least 1"),
        ({"schedule": (2, 0), "max_new_tokens": 3}, r"schedule=\[2, 0\]"),
        ({"schedule": (2, 3)}, "only the first 1 of max_new_tokens=2"),
        ({"cache_iterations": 0}, "cache_iterations=0"),
        ({"draft_steps": 1}, "use speculate_rows"),
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


def test_rows_of_one_number_draw_alike(make_model):
    model, prompt = make_model(), PROMPTS[0]
    options = Decoding(num_steps=2, max_new_tokens=6, temperature=1.0, seed=3)
    alike = collect(generate_rows(model, [prompt] * 3, options, numbers=[5, 0, 5]))
    assert alike[0] == alike[2]
    assert alike[0] != alike[1]
    assert alike[1] == [chosen.token for chosen in generate(model, prompt, options)]
