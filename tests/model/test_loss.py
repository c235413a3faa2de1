"""Chunked cross-entropy is cross-entropy."""

import pytest
import torch
from torch.nn import functional

from pretrain.model.loss import cross_entropy, linear_cross_entropy, weighted_sum


@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 20, 64])
def test_chunks_change_neither_value_nor_gradient(chunk_tokens):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(30, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(30, (20,), generator=generator)
    labels[4] = -100
    scale = torch.rand(20, generator=generator, dtype=torch.float64)

    whole = cross_entropy(hidden @ weight.T, labels)
    expected = torch.autograd.grad((whole * scale).sum(), (hidden, weight))
    chunked = linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk_tokens)
    found = torch.autograd.grad((chunked * scale).sum(), (hidden, weight))

    torch.testing.assert_close(chunked, whole, atol=1e-12, rtol=0.0)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0.0)


def logits_kept(tokens: int, *, chunk_tokens: int) -> list[tuple[int, ...]]:
    """Shapes of what autograd keeps for the backward pass with the width of the vocabulary."""
    hidden = torch.randn(tokens, 8, requires_grad=True)
    weight = torch.randn(1000, 8, requires_grad=True)
    labels = torch.randint(1000, (tokens,))
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda value: kept.append(tuple(value.shape)) or value, lambda value: value
    ):
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk_tokens)
    return [shape for shape in kept if shape == (tokens, 1000) or shape == (chunk_tokens, 1000)]


def test_the_logits_of_one_chunk_are_kept_however_many_there_are():
    one = logits_kept(4, chunk_tokens=4)
    assert one
    assert logits_kept(12, chunk_tokens=4) == one


def test_ignored_labels_count_nothing_and_get_no_gradient():
    logits = torch.randn(3, 5, requires_grad=True)
    labels = torch.tensor([1, -100, 2])
    nats, num = weighted_sum(cross_entropy(logits, labels), labels, None)
    nats.backward()
    torch.testing.assert_close(nats, functional.cross_entropy(logits, labels, reduction="sum"))
    assert num == 2
    assert not logits.grad[1].any()
    assert logits.grad[0].all()


def test_bf16_logits_are_summed_in_float32():
    logits = torch.randn(4, 1000, dtype=torch.bfloat16)
    labels = torch.randint(1000, (4,))
    nats = cross_entropy(logits, labels)
    assert nats.dtype == torch.float32
    exact = cross_entropy(logits.double(), labels)
    # float32 rounding over a sum of 1000 terms, far below bf16's 2^-8.
    torch.testing.assert_close(nats.double(), exact, rtol=1e-5, atol=0.0)
