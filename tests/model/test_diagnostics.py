"""Diagnostics against naive sums over all pairs of tokens, and their extremes."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pretrain.errors import ConfigError
from pretrain.model.depth import Depth
from pretrain.model.diagnostics import Diagnostics, diagnose, token_correlation
from pretrain.model.loss import IGNORED, divergence


def naive_correlation(x: Tensor) -> float:
    """The published definition: all cosines of centred vectors, their mean, less 1/T."""
    centred = x.double() - x.double().mean(-1, keepdim=True)
    tokens = len(x)
    cosines = torch.zeros(tokens, tokens)
    for i in range(tokens):
        for j in range(tokens):
            cosines[i, j] = torch.cosine_similarity(centred[i], centred[j], dim=0)
    return float(cosines.mean()) - 1 / tokens


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shared", [0.0, 0.5, 3.0])
def test_correlation_is_the_mean_over_all_pairs_of_counted_tokens(shared: float) -> None:
    x = draw(3, 9, 20) + shared * draw(3, 1, 20, seed=1) + 5.0
    counted = torch.ones(3, 9, dtype=torch.bool)
    counted[1, 6:] = False
    counted[2, ::2] = False
    found = token_correlation(x, counted)
    expected = [naive_correlation(x[row][counted[row]]) for row in range(3)]
    # unit vectors of float32, summed over 20 channels
    torch.testing.assert_close(found, torch.tensor(expected).double(), atol=1e-6, rtol=0)
    # and it tells the three apart: about 0, 0.2 and 0.9, less 1/n
    assert float(found[0]) == pytest.approx({0.0: 0.0, 0.5: 0.2, 3.0: 0.8}[shared], abs=0.1)


def test_one_state_for_all_tokens_correlates_fully_whatever_its_size() -> None:
    sizes = torch.rand(2, 10, 1, generator=torch.Generator().manual_seed(2)).double()
    x = draw(1, 1, 16).double() * sizes + 7.0
    every = torch.ones(2, 10, dtype=torch.bool)
    torch.testing.assert_close(
        token_correlation(x, every), torch.full((2,), 0.9, dtype=torch.float64), atol=1e-12, rtol=0
    )
    opposite = x - 7.0
    opposite[:, ::2] *= -1
    found = token_correlation(opposite, every)
    torch.testing.assert_close(
        found, torch.full((2,), -0.1, dtype=torch.float64), atol=1e-12, rtol=0
    )


def test_norm_and_residual_are_means_over_counted_tokens_on_one_scale() -> None:
    previous, state, hidden = draw(2, 4, 6), draw(2, 4, 6, seed=1), draw(2, 4, 6, seed=2)
    counted = torch.tensor([[True, True, False, True], [True, True, True, True]])
    found = diagnose(previous, state, hidden, counted)
    norms = [state[0, t].norm() for t in (0, 1, 3)]
    moves = [(state[0, t] - previous[0, t]).norm() / state[0, t].norm() for t in (0, 1, 3)]
    assert float(found.state_norm_B[0]) == pytest.approx(float(sum(norms)) / 3, rel=1e-6)
    assert float(found.residual_B[0]) == pytest.approx(float(sum(moves)) / 3, rel=1e-6)
    assert float(found.hidden_correlation_B[1]) == pytest.approx(
        naive_correlation(hidden[1]), abs=1e-6
    )


def test_rows_without_two_counted_tokens_add_nothing() -> None:
    counted = torch.tensor([[False, False, True], [False, False, False], [True, True, False]])
    found = diagnose(*(draw(3, 3, 4, seed=s) for s in range(3)), counted)
    assert found.is_measured_B.tolist() == [0, 0, 1]
    for values in found:
        assert values[:2].tolist() == [0, 0]
        assert values[2] != 0
        assert values.dtype == torch.float64


def test_the_model_measures_the_state_at_the_depth_asked_for(make_model) -> None:
    model = make_model()
    tokens = torch.randint(32, (2, 6), generator=torch.Generator().manual_seed(0))
    labels = tokens.roll(-1, 1)
    labels[0, 4:] = IGNORED
    start = draw(2, 6, 16).double()
    arguments = {"initial_state": start, "labels": labels}
    whole = model(tokens, [Depth(5, 0)] * 2, **arguments, return_states=True)
    for depth in (1, 3, 5):
        found = model(
            tokens, [Depth(5, 0)] * 2, **arguments, evaluate_depths=[2], diagnose_depth=depth
        )
        alone = model(tokens, [Depth(depth, 0)] * 2, **arguments)
        expected = diagnose(
            whole.states[depth - 1], whole.states[depth], alone.hidden, labels != IGNORED
        )
        for name in Diagnostics._fields:
            # float64, and batches of the same shape: the same numbers but for the order of sums
            torch.testing.assert_close(
                getattr(found.diagnostics, name), getattr(expected, name), atol=1e-12, rtol=0
            )
        assert found.nats_by_depth.shape == (1, 2)


@pytest.mark.parametrize("asked", [{"diagnose_depth": 4}, {"diagnose_depth": 0}])
def test_a_depth_that_is_not_reached_is_refused(make_model, asked: dict[str, int]) -> None:
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    arguments = {"initial_state": torch.zeros(1, 3, 16).double(), "labels": tokens}
    with pytest.raises(ConfigError, match="within 1 and 3"):
        make_model()(tokens, [Depth(3, 0)], **arguments, evaluate_depths=[1], **asked)
    with pytest.raises(ConfigError, match="needs evaluate_depths"):
        make_model()(tokens, [Depth(3, 0)], **arguments, **asked)


def test_moves_and_divergences_are_those_of_states_and_logits(make_model) -> None:
    model = make_model()
    tokens = torch.randint(32, (2, 6), generator=torch.Generator().manual_seed(0))
    labels = tokens.roll(-1, 1)
    labels[0, 4:] = IGNORED
    weights = draw(2, 6, seed=3).abs().double()
    arguments = {"initial_state": draw(2, 6, 16).double(), "labels": labels, "weights": weights}
    whole = model(tokens, [Depth(5, 0)] * 2, **arguments, return_states=True)
    found = model(
        tokens, [Depth(5, 0)] * 2, **arguments, evaluate_depths=[1, 3, 5], diagnose_depth=2
    )
    assert found.moves.shape == (5, 2)
    for t in range(1, 6):
        for row, counted in ((0, range(4)), (1, range(6))):
            before, after = whole.states[t - 1][row], whole.states[t][row]
            moves = [float((after[i] - before[i]).norm() / after[i].norm()) for i in counted]
            assert float(found.moves[t - 1, row]) == pytest.approx(sum(moves) / len(moves))
    logs = [
        model(tokens, [Depth(depth, 0)] * 2, **arguments).logits.log_softmax(-1)
        for depth in (1, 3, 5)
    ]
    assert found.kl_by_depth.shape == (2, 2)
    for index, (p, q) in enumerate(pairwise(logs)):
        kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
        expected = (kl * weights * (labels != IGNORED)).sum(1)
        # float64 throughout
        torch.testing.assert_close(found.kl_by_depth[index], expected, atol=1e-9, rtol=1e-9)


def test_chunks_change_no_divergence() -> None:
    first, second, head = draw(7, 4), draw(7, 4, seed=1), draw(11, 4, seed=2)
    whole = divergence(first, second, head)
    torch.testing.assert_close(divergence(first, second, head, chunk_tokens=3), whole)
    assert float(divergence(first, first, head).abs().max()) < 1e-6
    assert float(whole.min()) > 0
