"""On a GPU, tokens are the same with and without CUDA graphs."""

from dataclasses import replace

import pytest
import torch

from pretrain.model.decoding import Decoding, Exit, StateStart
from pretrain.model.generation import generate_rows, read_prompts
from pretrain.model.reading import Decoder
from pretrain.model.sampling import choose
from pretrain.model.speculative import speculate_rows
from text_oracle import UNEVEN

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
OPTIONS = Decoding(num_steps=6, max_new_tokens=8)


def read_tokens(model, options: Decoding, *, is_graphed: bool) -> tuple[list, list, int]:
    """Tokens and iterations of uneven rows, the third of which ends early; graphs captured."""
    capacity = max(map(len, UNEVEN)) + options.max_new_tokens
    decoder = Decoder(model, options, rows=len(UNEVEN), capacity=capacity, is_graphed=is_graphed)
    logits, tokens, steps, graphs = read_prompts(decoder, UNEVEN), [], [], 0
    for index in range(options.max_new_tokens - 1):
        chosen = choose(logits, options, rows=decoder.rows, positions=decoder.cache.lengths)
        if index == 3:
            chosen = chosen[decoder.keep([0, 1, 3])]
        depth = options.schedule[index] if index < len(options.schedule) else options.num_steps
        logits = decoder.read(chosen[:, None], num_steps=depth)
        tokens.append(chosen.tolist())
        steps.append(decoder.steps)
        graphs = max(graphs, len(decoder.runner._graphs))
    return tokens, steps, graphs


@pytest.mark.parametrize(
    "options",
    [
        OPTIONS,
        replace(OPTIONS, start=StateStart.warm),
        replace(OPTIONS, schedule=(2, 9, 4)),
        replace(OPTIONS, cache_iterations=2),
        replace(OPTIONS, num_steps=12, exit=Exit.kl),
        replace(OPTIONS, num_steps=12, exit=Exit.latent_diff, exit_threshold=0.1, check_every=2),
    ],
    ids=["fixed", "warm", "schedule", "shared", "kl", "latent"],
)
def test_graphs_change_no_token(make_model, options):
    # In float64 the two kernels that attention may take differ by far less than any two logits.
    model = make_model().cuda()
    plain_tokens, plain_steps, none = read_tokens(model, options, is_graphed=False)
    tokens, steps, graphs = read_tokens(model, options, is_graphed=True)
    assert (tokens, steps) == (plain_tokens, plain_steps)
    assert none == 0
    assert graphs >= 3


def test_numbers_go_on_inside_graphs(make_model):
    model = make_model(digit_positions=16).cuda()
    with torch.no_grad():
        # mostly digits, so that places matter
        model.embedding.weight[:10] *= 3.0
    plain, _, _ = read_tokens(model, OPTIONS, is_graphed=False)
    found, _, graphs = read_tokens(model, OPTIONS, is_graphed=True)
    assert found == plain
    assert graphs >= 3
    assert sum(token < 10 for row in plain for token in row) > 8


def test_speculation_on_a_gpu_gives_the_deep_tokens(make_model):
    model = make_model().cuda()
    steps = zip(*generate_rows(model, UNEVEN, OPTIONS), strict=True)
    expected = [[chosen.token for chosen in row] for row in steps]
    draft = replace(OPTIONS, draft_steps=2, lookahead=3)
    rows = zip(*(each.chosen for each in speculate_rows(model, UNEVEN, draft)), strict=True)
    assert [[chosen.token for part in row for chosen in part] for row in rows] == expected
