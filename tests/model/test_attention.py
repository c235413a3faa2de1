"""Attention against its definition."""

import math
from dataclasses import replace

import pytest
import torch

from pretrain.model.attention import attend
from pretrain.model.layout import Layout, Mask

ROWS, HEADS, WIDTH = 2, 3, 4


def naive(q, k, v, allowed):
    scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(WIDTH)
    scores = scores.masked_fill(~allowed, -math.inf)
    return torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v)


def check(queries, mask, allowed, keys=None):
    """Values and gradients of the queries over six keys against the definition."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(ROWS, tokens, HEADS, WIDTH, generator=generator, dtype=torch.float64)
        for tokens in (queries, 6, 6)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    layout = Layout.at(torch.arange(queries).expand(ROWS, -1), mask, head_width=WIDTH, base=10.0)
    found = attend(q, k, v, replace(layout, keys=keys))
    expected = naive(q, k, v, allowed)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0.0)
    upstream = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad(found, inputs, upstream)
    theirs = torch.autograd.grad(expected, inputs, upstream)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0.0)


@pytest.mark.parametrize(
    "mask",
    [
        Mask(),
        Mask(segments_BT=torch.tensor([[1, 1, 2, 2, 2, 3], [1, 1, 1, 1, 2, 2]])),
        Mask(prefixes_B=torch.tensor([3, 0])),
    ],
    ids=["causal", "documents", "prefix"],
)
def test_values_and_gradients_equal_the_definition(mask):
    index = torch.arange(6)
    allowed = torch.zeros(ROWS, 1, 6, 6, dtype=torch.bool)
    for row in range(ROWS):
        seen = index[None] <= index[:, None]
        if mask.prefixes_B is not None:
            seen = seen | (index[None] < mask.prefixes_B[row])
        if mask.segments_BT is not None:
            seen = seen & (mask.segments_BT[row][None] == mask.segments_BT[row][:, None])
        allowed[row, 0] = seen
    check(6, mask, allowed)


def test_a_last_token_sees_every_key():
    check(1, Mask(), torch.ones(ROWS, 1, 1, 6, dtype=torch.bool), keys=6)


def test_queries_behind_cached_keys_see_up_to_their_own_positions():
    positions = torch.tensor([[4, 5], [1, 2]])
    allowed = torch.arange(6) <= positions[:, None, :, None]
    check(2, Mask(positions_BT=positions), allowed, keys=6)
