"""Speculation gives the deep model's tokens exactly, and runs no accepted iteration twice."""

import pytest
import torch

from pretrain.errors import ConfigError
from pretrain.model.decoding import Decoding, Exit, StateStart
from pretrain.model.generation import collect, generate_rows
from pretrain.model.speculative import Round, speculate_rows
from text_oracle import UNEVEN, count_core_tokens


def speculate(model, prompts, **options: object) -> list[Round]:
    return list(speculate_rows(model, prompts, Decoding(**options)))


def tokens_of(rounds: list[Round]) -> list[list[int]]:
    rows = zip(*(each.chosen for each in rounds), strict=True)
    return [[chosen.token for part in row for chosen in part] for row in rows]


def deep(model, prompts, **options: object) -> list[list[int]]:
    return collect(generate_rows(model, prompts, Decoding(**options)))


def random_prompts(seed: int, rows: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (rows,), generator=generator).tolist()
    return [torch.randint(0, 32, (n,), generator=generator).tolist() for n in lengths]


def scale(model, factor: float) -> None:
    """How strongly iterations change the state: drafts agree more or less often."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("core") and name.endswith(("output", "down")):
                parameter.mul_(factor)


@pytest.mark.parametrize(
    ("temperature", "start"), [(0.0, StateStart.zeros), (0.7, StateStart.random)]
)
@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
def test_tokens_are_those_of_the_deep_model(make_model, factor, temperature, start):
    model = make_model()
    scale(model, factor)
    rates = []
    for seed, (draft_steps, lookahead) in enumerate([(1, 3), (2, 5), (3, 1), (1, 8)]):
        prompts = random_prompts(seed, rows=5)
        options = {
            "num_steps": 7,
            "max_new_tokens": 10,
            "temperature": temperature,
            "start": start,
            "seed": seed,
        }
        expected = deep(model, prompts, **options)
        stop = expected[2][4]
        for stop_ids in ((), (stop,)):
            rounds = speculate(
                model,
                prompts,
                draft_steps=draft_steps,
                lookahead=lookahead,
                stop_ids=stop_ids,
                **options,
            )
            found = tokens_of(rounds)
            for row, whole in zip(found, expected, strict=True):
                length = whole.index(stop) + 1 if stop_ids and stop in whole else len(whole)
                assert row == whole[:length]
            rates.append(sum(r.accepted for r in rounds) / sum(r.drafted for r in rounds))
            steps = {chosen.steps for r in rounds for row in r.chosen for chosen in row}
            assert steps == {7}
    assert 0.0 < max(rates) < 1.0


def test_rows_accept_different_numbers_of_tokens(make_model):
    model = make_model()
    options = {"num_steps": 7, "draft_steps": 1, "lookahead": 4, "max_new_tokens": 10}
    rounds = speculate(model, UNEVEN, **options)
    lengths = [{len(row) for row in each.chosen} for each in rounds[1:]]
    assert any(len(each) > 1 for each in lengths)
    assert max(max(each) for each in lengths) > 1


def test_verification_goes_on_from_the_draft(make_model):
    model = make_model()
    options = {"num_steps": 7, "draft_steps": 3, "lookahead": 4, "max_new_tokens": 9}
    with count_core_tokens(model) as counted:
        rounds = speculate(model, [[3, 1, 4]], **options)
    # Three tokens of the prompt, then every drafted token once through all iterations.
    assert sum(counted) == 7 * (3 + sum(each.drafted for each in rounds))


def test_drafts_as_deep_as_a_fixed_point_are_all_accepted(make_model):
    model = make_model()
    # The adapter ignores the state, so every iteration gives the same one.
    with torch.no_grad():
        model.core.iteration.adapter[:, :16] = 0.0
    options = {"num_steps": 5, "max_new_tokens": 9, "draft_steps": 1, "lookahead": 4}
    rounds = speculate(model, [[3, 1, 4], [5]], **options)
    assert [(each.drafted, each.accepted) for each in rounds] == [(0, 0), (8, 8), (8, 8)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft_steps": 5}, "draft_steps=5 must be below num_steps=5"),
        ({"draft_steps": 0}, "draft_steps=0 must be at least 1"),
        ({"lookahead": 0}, "lookahead=0 must be at least 1"),
        ({"draft_steps": None}, "use generate_rows"),
        ({"exit": Exit.kl}, "cannot be joined with exit=kl"),
        ({"start": StateStart.warm}, "cannot be joined with start=warm"),
        ({"cache_iterations": 4}, "cannot be joined with cache_iterations=4"),
        ({"schedule": (3,)}, r"cannot be joined with schedule=\[3\]"),
    ],
)
def test_what_cannot_be_drafted_is_refused(make_model, changes, message):
    options = {"num_steps": 5, "max_new_tokens": 4, "draft_steps": 2, **changes}
    with pytest.raises(ConfigError, match=message):
        speculate(make_model(), [[1, 2]], **options)
