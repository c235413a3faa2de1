"""Sampling follows its law."""

import pytest
import torch

from pretrain.model.sampling import sample

# Probabilities 0.5, 0.3, 0.15, 0.05, not in order of id.
LOGITS = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.15, 0.5, 0.05, 0.3]),
        ({"top_k": 2}, [0.0, 0.625, 0.0, 0.375]),
        ({"top_k": 9}, [0.15, 0.5, 0.05, 0.3]),
        ({"top_p": 0.6}, [0.0, 0.625, 0.0, 0.375]),
        ({"top_p": 0.01}, [0.0, 1.0, 0.0, 0.0]),
        ({"top_p": 1.0}, [0.15, 0.5, 0.05, 0.3]),
        # Of the three kept, renormalised to 0.526, 0.316, 0.158, two reach 0.8.
        ({"top_k": 3, "top_p": 0.8}, [0.0, 0.625, 0.0, 0.375]),
        # Squared and renormalised.
        ({"temperature": 0.5}, [0.0225 / 0.365, 0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365]),
    ],
)
def test_samples_follow_the_filtered_distribution(options, expected):
    draws = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    tokens = sample(LOGITS.expand(10_000, 4), draws, **{"temperature": 1.0, **options})
    found = tokens.bincount(minlength=4) / 10_000
    # Evenly spaced draws invert the CDF to within one draw at each edge.
    torch.testing.assert_close(found, torch.tensor(expected), atol=2e-4, rtol=0.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_deterministic_algorithms_take_no_more_memory():
    logits = torch.randn(2, 65_536, generator=torch.Generator().manual_seed(0))
    draws = torch.tensor([0.2, 0.9], dtype=torch.float64)
    wanted = sample(logits, draws, temperature=0.7, top_p=0.9)
    torch.use_deterministic_algorithms(True)
    try:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = sample(logits.cuda(), draws.cuda(), temperature=0.7, top_p=0.9)
        # some ten arrays of 65,536 float64 for each of two rows; one of V x V is 34 GB
        assert torch.cuda.max_memory_allocated() - before < 100e6
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found.cpu(), wanted)
