"""What the loop relies on: rows are independent, evaluation is one pass, input is checked."""

import pytest
import torch
from torch import Tensor

from pretrain.errors import ConfigError
from pretrain.model.config import DocumentMask
from pretrain.model.depth import Depth
from pretrain.model.recurrent import RecurrentModel

ROWS, TOKENS = 4, 12

# float64, see test_core.
ATOL = 1e-11


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(32, (ROWS, TOKENS), generator=generator)
    labels[1, 3:5] = -100
    return {
        "tokens": torch.randint(32, (ROWS, TOKENS), generator=generator),
        "initial_state": torch.randn(ROWS, TOKENS, 16, generator=generator, dtype=torch.float64),
        "labels": labels,
        "weights": torch.rand(ROWS, TOKENS, generator=generator, dtype=torch.float64),
    }


def test_losses_at_equal_separate_forwards(make_model):
    model = make_model()
    calls = []
    model.core.register_forward_hook(lambda *_: calls.append(1))
    nats, num_labels = model.losses_at(depths=[3, 1, 3, 5], **batch())
    assert len(calls) == 1
    for row in range(ROWS):
        span = {name: value[row : row + 1] for name, value in batch().items()}
        for index, depth in enumerate([3, 1, 3, 5]):
            output = model(depths=[Depth(depth, 0)], **span)
            torch.testing.assert_close(nats[index, row], output.nats, atol=ATOL, rtol=0.0)
            torch.testing.assert_close(num_labels[row], output.num_labels, atol=ATOL, rtol=0.0)
    assert not nats.requires_grad


def test_rows_do_not_know_their_batch(make_model):
    model = make_model()
    depths = [Depth(0, 2), Depth(3, 2), Depth(1, 2), Depth(3, 2)]
    order = [2, 0, 3, 1]
    straight = model(depths=depths, **batch())
    permuted = model(
        depths=[depths[row] for row in order],
        **{name: value[order] for name, value in batch().items()},
    )
    torch.testing.assert_close(permuted.logits, straight.logits[order], atol=ATOL, rtol=0.0)
    torch.testing.assert_close(permuted.state, straight.state[order], atol=ATOL, rtol=0.0)
    torch.testing.assert_close(permuted.nats, straight.nats, atol=ATOL, rtol=1e-12)


def test_the_loss_without_logits_equals_the_loss_with_them(make_model):
    model = make_model()
    found = []
    for keep_logits in (True, False):
        output = model(depths=[Depth(1, 2)] * ROWS, keep_logits=keep_logits, **batch())
        output.nats.backward()
        found.append((output, model.embedding.weight.grad.clone()))
        model.zero_grad()
    (with_logits, gradient), (without, same_gradient) = found
    assert without.logits is None
    torch.testing.assert_close(without.nats, with_logits.nats, atol=ATOL, rtol=1e-12)
    torch.testing.assert_close(without.loss, with_logits.loss, atol=ATOL, rtol=1e-12)
    torch.testing.assert_close(same_gradient, gradient, atol=ATOL, rtol=1e-12)


def test_weights_scale_each_token_and_minus_100_does_not_count(make_model):
    model = make_model()
    given = batch()
    output = model(depths=[Depth(2, 0)] * ROWS, **given)
    logp = output.logits.log_softmax(-1)
    expected, count = 0.0, 0.0
    for row in range(ROWS):
        for token in range(TOKENS):
            label = given["labels"][row, token]
            if label != -100:
                expected -= given["weights"][row, token] * logp[row, token, label]
                count += given["weights"][row, token]
    torch.testing.assert_close(output.nats, expected, atol=ATOL, rtol=1e-12)
    torch.testing.assert_close(output.num_labels, count, atol=ATOL, rtol=1e-12)


def documents_of_lengths(*lengths: int) -> Tensor:
    """One row; the last length is padding."""
    indices = [*range(len(lengths) - 1), -1]
    return torch.repeat_interleave(torch.tensor(indices), torch.tensor(lengths))[None]


def test_isolated_documents_equal_rows_of_their_own(make_model):
    model = make_model(documents=DocumentMask.isolated)
    given = {name: value[:1] for name, value in batch().items()}
    depths = [Depth(1, 2)]
    together = model(depths=depths, documents=documents_of_lengths(5, 1, 4, 2), **given)
    together.nats.backward()
    gradient = model.core.iteration.adapter.grad.clone()
    model.zero_grad()
    total = 0.0
    for start, stop in ((0, 5), (5, 6), (6, 10), (10, 12)):
        alone = model(
            depths=depths,
            documents=torch.zeros(1, stop - start, dtype=torch.long),
            **{name: value[:, start:stop] for name, value in given.items()},
        )
        torch.testing.assert_close(
            together.logits[:, start:stop], alone.logits, atol=ATOL, rtol=0.0
        )
        total = total + alone.nats
    total.backward()
    torch.testing.assert_close(together.nats, total, atol=ATOL, rtol=1e-12)
    torch.testing.assert_close(model.core.iteration.adapter.grad, gradient, atol=ATOL, rtol=1e-9)


def test_isolated_documents_follow_their_rows_through_mixed_depths(make_model):
    model = make_model(documents=DocumentMask.isolated)
    given = batch()
    documents = torch.cat(
        [documents_of_lengths(*lengths) for lengths in ((12, 0), (3, 9), (6, 6, 0), (1, 10, 1))]
    )
    depths = [Depth(0, 1), Depth(2, 2), Depth(1, 2), Depth(4, 2)]
    together = model(depths=depths, documents=documents, **given)
    for row in range(ROWS):
        span = slice(row, row + 1)
        alone = model(
            depths=depths[span],
            documents=documents[span],
            **{name: value[span] for name, value in given.items()},
        )
        torch.testing.assert_close(together.logits[span], alone.logits, atol=ATOL, rtol=0.0)


def test_documents_change_nothing_where_attention_crosses_them(make_model):
    model = make_model()
    given = {name: value[:1] for name, value in batch().items()}
    plain = model(depths=[Depth(1, 0)], **given)
    packed = model(depths=[Depth(1, 0)], documents=documents_of_lengths(5, 5, 2), **given)
    assert torch.equal(plain.logits, packed.logits)


def influences(model: RecurrentModel, prefix: int) -> Tensor:
    """Whether token i's logits depend on token j: [i, j]."""
    given = {name: value[:1] for name, value in batch().items()}
    options = {"depths": [Depth(1, 0)], "prefixes": torch.tensor([prefix])}
    base = model(**options, **given).logits
    rows = []
    for index in range(TOKENS):
        changed = dict(given, tokens=given["tokens"].clone())
        changed["tokens"][0, index] = (changed["tokens"][0, index] + 1) % 32
        rows.append((model(**options, **changed).logits != base).any(-1)[0])
    return torch.stack(rows, dim=1)


def test_a_bidirectional_prefix_is_seen_by_all(make_model):
    found = influences(make_model(), prefix=4)
    index = torch.arange(TOKENS)
    expected = (index[None] <= index[:, None]) | (index[None] < 4)
    assert torch.equal(found, expected)


def test_weights_are_nan_until_they_are_set(make_model):
    config = make_model().config
    assert all(parameter.isnan().all() for parameter in RecurrentModel(config).parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": [Depth(1, 0)] * 3}, "4 rows of 12 tokens came with 3 depths"),
        ({"depths": [Depth(0, 0)] * 4}, "row 0 has .*at least 1"),
        ({"depths": [Depth(3, -1)] * 4}, "row 0 has"),
        ({"initial_state": torch.zeros(4, 11, 16)}, r"initial state of \(4, 11\)"),
        ({"evaluate_depths": [1, 9]}, "must lie within 1 and 2"),
        ({"evaluate_depths": []}, "at least one depth"),
        ({"evaluate_depths": [1], "labels": None}, "needs labels"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(make_model, changes, message):
    arguments = {"depths": [Depth(2, 0)] * 4, **batch(), **changes}
    with pytest.raises(ConfigError, match=message):
        make_model()(**arguments)


def test_isolated_documents_must_be_given(make_model):
    with pytest.raises(ConfigError, match="pass documents"):
        make_model(documents=DocumentMask.isolated)(depths=[Depth(1, 0)] * 4, **batch())


def test_bf16_weights_stay_close_to_float32_ones(make_model):
    given = batch()
    del given["weights"]
    exact = make_model(dtype=torch.float32)
    rounded = make_model(dtype=torch.bfloat16)
    outputs = [model(depths=[Depth(1, 2)] * ROWS, **given) for model in (exact, rounded)]
    assert outputs[1].state.dtype == torch.bfloat16
    assert outputs[1].logits.dtype == outputs[1].nats.dtype == torch.float32
    # bf16 keeps 8 bits; 9 layers of unit-scale sums stay within a few times 2^-8 of the loss.
    torch.testing.assert_close(
        outputs[0].loss.float(), outputs[1].loss.float(), rtol=0.02, atol=0.0
    )
