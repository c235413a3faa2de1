"""Text by whole passes is the text of the cached decoder, and disturbs nothing around it."""

import dataclasses

import pytest
import torch

from pretrain.errors import ConfigError
from pretrain.model.config import ComputePath, DocumentMask
from pretrain.model.decoding import Decoding
from pretrain.model.depth import Depth
from pretrain.model.fused.attention import BLOCK
from pretrain.model.generation import collect, generate_rows
from pretrain.model.initial_state import initial_states
from pretrain.model.lockstep import continue_in_lockstep, row_tokens
from pretrain.model.recurrent import RecurrentModel
from text_oracle import UNEVEN

DEPTHS = [1, 4, 2, 4]


def passes(model, *, prompts=UNEVEN, depths=DEPTHS, temperature=0.0, seed=3, new_tokens=7):
    return continue_in_lockstep(
        model, model.config, prompts, depths,
        new_tokens=new_tokens, temperature=temperature, seed=seed, device=torch.device("cpu"),
    )  # fmt: skip


@pytest.mark.parametrize("documents", list(DocumentMask))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_of_all_depths_are_what_generate_gives_each_prompt_alone(
    make_model, temperature, documents
):
    model = make_model(documents=documents)
    rows = passes(model, temperature=temperature)
    for prompt, depth, found in zip(UNEVEN, DEPTHS, rows, strict=True):
        options = Decoding(num_steps=depth, max_new_tokens=7, temperature=temperature, seed=3)
        assert collect(generate_rows(model, [prompt], options)) == [found]
    assert rows != passes(model, temperature=temperature or 1.0, seed=4)


def test_the_passes_are_equally_many_and_of_equal_shape_whatever_is_chosen(make_model):
    model = make_model()
    seen = []

    def forward(tokens, depths, **rest):
        seen.append((tokens.shape, depths))
        return model(tokens, depths, **rest)

    for seed in (0, 1):
        passes(forward_of(model, forward), temperature=1.0, seed=seed)
    # 6 + 7 - 1 tokens are read at most, in whole sixteens
    assert seen == [((4, 16), [Depth(depth, 0) for depth in DEPTHS])] * 14
    assert row_tokens([[0] * 10], 7) == 16
    assert row_tokens([[0] * 10], 8) == 32


def forward_of(model, forward):
    forward.config = model.config
    return forward


def test_logits_of_one_token_are_those_of_all(make_model):
    model = make_model()
    tokens, state = (
        torch.tensor(UNEVEN[0:1] * 3),
        initial_states([0] * 3, seed=0, context=4, width=16),
    )
    depths, at = [Depth(2, 0), Depth(1, 0), Depth(3, 0)], torch.tensor([3, 0, 2])
    whole = model(tokens, depths, initial_state=state).logits
    part = model(tokens, depths, initial_state=state, logits_at=at).logits
    torch.testing.assert_close(part[:, 0], whole[range(3), at], atol=1e-12, rtol=0.0)


def test_a_prompt_that_does_not_fit_is_refused(make_model):
    for prompts in ([[1, 2], []], [[1] * 10]):
        with pytest.raises(ConfigError, match=r"model\.context=16"):
            passes(make_model(), prompts=prompts, depths=[1] * len(prompts))


def test_compiled_layers_are_not_compiled_for_short_rows(make_model):
    plain = make_model(dtype=torch.float32)
    model = RecurrentModel(dataclasses.replace(plain.config, path=ComputePath.compiled))
    model.load_state_dict(plain.state_dict())
    torch._dynamo.reset()
    before = dict(torch._dynamo.utils.counters["stats"])
    assert passes(model) == passes(plain)
    assert dict(torch._dynamo.utils.counters["stats"]) == before


def test_flex_attention_is_not_compiled_for_short_rows():
    """It takes rows of whole blocks; the code of another length would then serve training too."""
    for tokens in range(1, 400):
        length = row_tokens([[0] * tokens], 1)
        assert length % BLOCK
        assert length % 16 == 0
        assert tokens <= length < tokens + 32
