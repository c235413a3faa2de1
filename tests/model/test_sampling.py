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
