"""Every row gets exactly its own iterations and its own gradient, and nothing is computed twice."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain.errors import ConfigError
from pretrain.model.core import RecurrentCore
from pretrain.model.depth import Depth
from pretrain.model.recurrent import RecurrentModel

TOKENS = 6

# float64: rounding is 1e-16 and the batch sums a few hundred terms, bugs are 1e-3 and more.
ATOL = 1e-11

any_depth = st.builds(Depth, st.integers(0, 4), st.integers(0, 4)).filter(lambda d: d.total > 0)

# The model fixture is a factory and keeps no state between examples.
relaxed = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def batch(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    tokens = torch.randint(32, (rows, TOKENS), generator=generator)
    labels = torch.randint(32, (rows, TOKENS), generator=generator)
    state = torch.randn(rows, TOKENS, 16, generator=generator, dtype=torch.float64)
    return tokens, labels, state


def gradients_of(model: RecurrentModel) -> dict[str, Tensor]:
    found = {
        name: torch.zeros_like(value) if value.grad is None else value.grad.clone()
        for name, value in model.named_parameters()
    }
    model.zero_grad()
    return found


def plain_run(model: RecurrentModel, depth: Depth, tokens: Tensor, state: Tensor) -> Tensor:
    """One row, written out: the definition that the loop is compared with. Returns logits."""
    layout = model._layout(tokens, None, None)
    embedded = model.embedding(tokens)
    for layer in model.prelude:
        embedded = layer(embedded, layout)
    with torch.no_grad():
        for _ in range(depth.no_grad):
            state = model.core.iteration(state, embedded, layout)
    for _ in range(depth.with_grad):
        state = model.core.iteration(state, embedded, layout)
    _, hidden = model.decode(state, layout)
    return model.embedding(None, hidden)


@relaxed
@given(depths=st.lists(any_depth, min_size=1, max_size=5), is_checkpointed=st.booleans())
def test_mixed_depths_equal_rows_run_by_themselves(make_model, depths, is_checkpointed):
    model = make_model()
    model.kept_iterations = 0 if is_checkpointed else None
    tokens, labels, state = batch(len(depths))
    output = model(tokens, depths, initial_state=state, labels=labels)
    output.nats.backward()
    together = gradients_of(model)
    for row, depth in enumerate(depths):
        span = slice(row, row + 1)
        logits = plain_run(model, depth, tokens[span], state[span])
        torch.testing.assert_close(output.logits[span], logits, atol=ATOL, rtol=0.0)
        torch.nn.functional.cross_entropy(logits[0], labels[row], reduction="sum").backward()
    alone = gradients_of(model)
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, alone[name], atol=ATOL, rtol=1e-9, msg=name)


@pytest.mark.parametrize(
    "depths",
    [
        [Depth(3, 2), Depth(0, 2), Depth(1, 2)],
        # Rows whose suffixes differ, the case that the law only has below its backprop depth.
        [Depth(0, 4), Depth(3, 1), Depth(2, 0), Depth(0, 1)],
    ],
)
def test_the_layers_run_as_many_rows_as_the_sum_of_depths(make_model, depths):
    model = make_model()
    rows, calls = [], []
    model.core.iteration.layers[0].register_forward_hook(
        lambda _, inputs, __: rows.append(inputs[0].shape[0])
    )
    model.core.register_forward_hook(lambda *_: calls.append(1))
    tokens, labels, state = batch(len(depths))
    model(tokens, depths, initial_state=state, labels=labels)
    assert sum(rows) == sum(depth.total for depth in depths)
    # Deepest first: active rows only ever grow.
    assert rows == sorted(rows)
    # An engine that shards weights must see one call.
    assert len(calls) == 1


def test_no_row_gets_gradient_before_its_suffix(make_model):
    model = make_model()
    embedded = torch.randn(2, TOKENS, 16, dtype=torch.float64, requires_grad=True)
    tokens, _, start = batch(2)
    start.requires_grad_()
    layout = model._layout(tokens, None, None)
    state, *_ = model.core(embedded, start, depths=[Depth(2, 0), Depth(0, 3)], layout=layout)
    state.square().sum().backward()
    assert not embedded.grad[0].any()
    assert not start.grad[0].any()
    assert embedded.grad[1].all()
    assert start.grad[1].all()


def test_no_gradient_at_all_leaves_the_core_without_one(make_model):
    model = make_model()
    tokens, labels, state = batch(2)
    depths = [Depth(2, 0), Depth(3, 0)]
    model(tokens, depths, initial_state=state, labels=labels).nats.backward()
    assert all(parameter.grad is None for parameter in model.core.parameters())
    assert model.embedding.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_changes_no_bit(make_model, dtype):
    model = make_model(dtype=dtype)
    tokens, labels, state = batch(3)
    found = []
    for is_checkpointed in (False, True):
        model.kept_iterations = 0 if is_checkpointed else None
        depths = [Depth(1, 3), Depth(0, 2), Depth(2, 3)]
        output = model(tokens, depths, initial_state=state, labels=labels)
        output.nats.backward()
        found.append((output.logits.detach(), gradients_of(model)))
    assert torch.equal(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name]), name


def test_checkpointing_recomputes_each_gradient_iteration_once(make_model):
    model = make_model()
    model.kept_iterations = 0
    calls = []
    # A hook on the layer, not on the iteration: recomputation stops early at the last saved tensor.
    model.core.iteration.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    tokens, labels, state = batch(2)
    model(tokens, [Depth(2, 3)] * 2, initial_state=state, labels=labels).nats.backward()
    assert len(calls) == 2 + 3 + 3


def test_states_of_rows_that_end_early_are_their_last(make_model):
    model = make_model()
    tokens, _, state = batch(4)
    depths = [Depth(0, 1), Depth(3, 2), Depth(1, 2), Depth(2, 3)]
    together = model(tokens, depths, initial_state=state, return_states=True).states
    assert len(together) == 6
    for row, depth in enumerate(depths):
        one = slice(row, row + 1)
        alone = model(tokens[one], [depth], initial_state=state[one], return_states=True).states
        for iterations, states in enumerate(together):
            own = alone[min(iterations, depth.total)]
            torch.testing.assert_close(states[one], own, atol=1e-12, rtol=0.0)


def test_a_depth_beyond_the_shallowest_row_is_not_evaluated(make_model):
    model = make_model()
    tokens, labels, state = batch(2)
    depths = [Depth(0, 1), Depth(1, 1)]
    with pytest.raises(ConfigError, match=r"evaluate_depths=\[2\] .* within 1 and 1"):
        model(tokens, depths, initial_state=state, labels=labels, evaluate_depths=[2])


def test_the_whole_recurrence_is_one_module(make_model):
    core = make_model().core
    assert isinstance(core, RecurrentCore)
    names = {name.split(".")[0] for name, _ in core.named_parameters()}
    assert names == {"iteration"}
