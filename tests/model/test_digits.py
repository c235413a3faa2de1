"""Digits have places: what each token is given, in whole rows, in pieces, on every path."""

import dataclasses
import math

import pytest
import torch

from pretrain.errors import ConfigError
from pretrain.model.config import ComputePath
from pretrain.model.cost import count_parameters
from pretrain.model.decoding import Decoding, StateStart
from pretrain.model.depth import Depth
from pretrain.model.digits import DigitEmbedding, digit_shifts
from pretrain.model.generation import Decoder, collect, generate_rows
from pretrain.model.init import initial_values, initialize
from pretrain.model.initial_state import initial_states
from pretrain.model.recurrent import RecurrentModel
from pretrain.model.speculative import speculate_rows

# Tokens below 10 are digits, as in the fixture's model.
NUMBERS = [[3, 1, 4, 20, 5, 9, 2, 6], [20, 20, 7, 7, 7, 7, 7, 7], [1, 30, 1, 30, 1, 1, 30, 30]]


def places(row: list[int], shift: int = 0) -> list[int | None]:
    """The place of each token, one after the other; None for what is no digit."""
    found, run = [], 0
    for token in row:
        run = run + 1 if token < 10 else 0
        found.append(run - 1 + shift if run else None)
    return found


def vectors(table: DigitEmbedding, rows: list[list[int]], shifts: list[int]) -> torch.Tensor:
    zero = torch.zeros_like(table.weight[0])
    return torch.stack([
        torch.stack([
            zero if place is None or place >= len(table.weight) else table.weight[place] * 4.0
            for place in places(row, shift)
        ])
        for row, shift in zip(rows, shifts, strict=True)
    ])  # fmt: skip


def test_every_digit_gets_the_vector_of_its_place(make_model) -> None:
    table = make_model(digit_positions=9).digit_embedding
    found = table(torch.tensor(NUMBERS))
    assert torch.equal(found, vectors(table, NUMBERS, [0, 0, 0]))
    assert found.abs().max() > 0.1


def test_digits_beyond_the_last_place_get_none(make_model) -> None:
    table = make_model(digit_positions=4).digit_embedding
    found = table(torch.tensor(NUMBERS))
    assert torch.equal(found, vectors(table, NUMBERS, [0, 0, 0]))
    assert not found[1, 6:].any()
    assert found[1, 2:6].any(1).all()
    # nothing leaves no room to shift by
    shifted = table(torch.tensor(NUMBERS[1:2]), torch.tensor([0.99]))
    assert torch.equal(shifted, found[1:2])


def test_a_shift_is_a_share_of_the_room_that_the_longest_number_leaves(make_model) -> None:
    table = make_model(digit_positions=9).digit_embedding
    # longest numbers of 4, 6 and 2 digits leave rooms of 5, 3 and 7
    for share, shifts in ((0.0, [0, 0, 0]), (0.5, [3, 2, 4]), (1.0 - 1e-12, [5, 3, 7])):
        found = table(torch.tensor(NUMBERS), torch.full((3,), share, dtype=torch.float64))
        assert torch.equal(found, vectors(table, NUMBERS, shifts)), share


def test_a_row_keeps_its_shift_wherever_it_is_trained() -> None:
    shifts = digit_shifts(range(1000), seed=3)
    assert torch.equal(digit_shifts([17, 5], seed=3), shifts[[17, 5]])
    assert not torch.equal(digit_shifts(range(1000), seed=4), shifts)
    # 1000 uniform draws in 10 cells of 100: a cell's count has a standard deviation of 9.5
    counts = torch.histc(shifts, 10, 0.0, 1.0)
    assert (counts - 100).abs().max() < 5 * 9.5


def test_places_are_learned_where_digits_stood(make_model) -> None:
    model = make_model(digit_positions=9)
    tokens = torch.tensor(NUMBERS[:1])
    output = model(
        tokens, [Depth(1, 2)], initial_state=initial_states([0], seed=0, context=8, width=16),
        labels=tokens,
    )  # fmt: skip
    output.nats.backward()
    learned = model.digit_embedding.weight.grad.any(1).tolist()
    assert learned == [True] * 4 + [False] * 5


def test_the_fused_path_has_the_same_gradients(make_model) -> None:
    plain = make_model(digit_positions=9)
    fused = RecurrentModel(dataclasses.replace(plain.config, path=ComputePath.fused)).double()
    fused.load_state_dict(plain.state_dict())
    fused.digit_embedding.tell_digits(range(10))
    tokens = torch.tensor(NUMBERS)
    state = initial_states(range(3), seed=0, context=8, width=16, dtype=torch.float64)
    shift = digit_shifts(range(3), seed=0)
    for model in (plain, fused):
        output = model(
            tokens, [Depth(1, 2), Depth(0, 3), Depth(0, 1)], initial_state=state,
            labels=tokens.roll(-1, 1), digit_shift=shift, keep_logits=False,
        )  # fmt: skip
        output.nats.backward()
    wanted = dict(plain.named_parameters())
    for name, parameter in fused.named_parameters():
        # as the fused path's own tests: float64, and sums over a few hundred terms
        distance = (parameter.grad - wanted[name].grad).norm() / wanted[name].grad.norm()
        assert distance < 1e-12, name


def test_numbers_go_on_where_the_cache_ends(make_model) -> None:
    model = make_model(digit_positions=9)
    text = torch.tensor(NUMBERS)
    state = initial_states(range(3), seed=4, context=8, width=16)
    whole = model(text, [Depth(3, 0)] * 3, initial_state=state).logits
    decoder = Decoder(model, Decoding(num_steps=3, max_new_tokens=1, seed=4), rows=3, capacity=8)
    for start, stop in ((0, 2), (2, 5), (5, 6), (6, 7), (7, 8)):
        found = decoder.read(text[:, start:stop])
        torch.testing.assert_close(found, whole[:, stop - 1], atol=1e-11, rtol=0.0)


def digits_first(model: RecurrentModel) -> None:
    """Make the text that it writes mostly digits, so that places matter."""
    with torch.no_grad():
        model.embedding.weight[:10] *= 3.0


UNEVEN = [[3, 1, 20, 1], [5], [9, 2], [20, 5, 3, 5, 8, 9]]


def test_rows_of_unequal_length_that_leave_are_each_continued_as_if_alone(make_model) -> None:
    model = make_model(digit_positions=16)
    digits_first(model)
    options = {"num_steps": 3, "max_new_tokens": 9, "start": StateStart.zeros}
    alone = [collect(generate_rows(model, [p], Decoding(**options)))[0] for p in UNEVEN]
    for prompt, new in zip(UNEVEN, alone, strict=True):
        text = torch.tensor([prompt + new])
        zeros = torch.zeros(1, text.shape[1], 16, dtype=torch.float64)
        logits = model(text, [Depth(3, 0)], initial_state=zeros).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == new
    assert sum(token < 10 for new in alone for token in new) > 9
    stop = alone[0][3]
    rows = collect(generate_rows(model, UNEVEN, Decoding(**options, stop_ids=[stop])))
    for new, wanted in zip(rows, alone, strict=True):
        assert new == wanted[: wanted.index(stop) + 1 if stop in wanted else None]
    assert len({len(row) for row in rows}) > 1


def test_rejected_drafts_leave_no_digits_behind(make_model) -> None:
    model = make_model(digit_positions=16)
    digits_first(model)
    options = {"num_steps": 5, "max_new_tokens": 9, "start": StateStart.zeros}
    wanted = collect(generate_rows(model, UNEVEN, Decoding(**options)))
    rounds = list(speculate_rows(model, UNEVEN, Decoding(**options, draft_steps=1, lookahead=4)))
    rows = zip(*(each.chosen for each in rounds), strict=True)
    assert [[chosen.token for part in row for chosen in part] for row in rows] == wanted
    drafted, accepted = sum(r.drafted for r in rounds), sum(r.accepted for r in rounds)
    assert 0 < accepted < drafted


def test_places_begin_as_tokens_do_and_are_counted(make_model) -> None:
    config = dataclasses.replace(make_model().config, digit_positions=500)
    model = RecurrentModel(config)
    initialize(model, mean_depth=4, seed=1)
    weight = model.digit_embedding.weight.detach()
    # the sample's spread of 8000 draws, cut at 3 sigmas, lies within 5 standard errors
    sigma = 0.98658 * math.sqrt(2 / (5 * 16))
    assert abs(float(weight.std()) / sigma - 1) < 5 / math.sqrt(2 * weight.numel())
    drawn = initial_values(model, "digit_embedding.weight", range(160), mean_depth=4, seed=1)
    assert torch.equal(drawn.view(10, 16), weight[:10])
    counts = count_parameters(config)
    assert counts["digit places"] == 500 * 16
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())


def test_digits_must_be_known(make_model) -> None:
    config = dataclasses.replace(make_model().config, digit_positions=5)
    table = DigitEmbedding(config, 5)
    with pytest.raises(ConfigError, match="needs to know which tokens are digits"):
        table(torch.tensor([[1]]))
    with pytest.raises(ConfigError, match=r"lie within 0 and 31"):
        table.tell_digits([3, 32])
    with pytest.raises(ConfigError, match="digit_positions=0 must be at least 1"):
        dataclasses.replace(config, digit_positions=0)
