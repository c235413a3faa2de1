"""How a parameter is made, before it is initialised or loaded."""

import math

import torch
from torch import nn


def unset(*shape: int) -> nn.Parameter:
    """A parameter full of NaN: a model that was neither initialised nor loaded cannot pass."""
    return nn.Parameter(torch.full(shape, math.nan))
