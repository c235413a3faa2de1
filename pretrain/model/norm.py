"""Root-mean-square normalisation."""

import torch
from torch import Tensor, nn

from pretrain.model.config import ComputePath, ModelConfig
from pretrain.model.parameter import unset
from pretrain_kernels.rms_norm import rms_norm_autograd


def make_norm(config: ModelConfig) -> nn.Module:
    """The model's norm, with or without a learned gain."""
    if config.norm_gain:
        is_fused = config.path is ComputePath.fused
        return RMSNorm(config.width, config.norm_epsilon, is_fused=is_fused)
    return PlainRMSNorm(config.norm_epsilon)


class PlainRMSNorm(nn.Module):
    """x / RMS(x), cast back to x's dtype (arXiv 1910.07467).

    The statistics are float32 whatever the dtype of x (float64 for float64).
    """

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] in x's dtype."""
        return _normalize(x_BTD, self.epsilon)


class RMSNorm(nn.Module):
    """The same, times a learned gain."""

    def __init__(self, width: int, epsilon: float, *, is_fused: bool = False) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.is_fused = is_fused
        self.gain = unset(width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] in x's dtype, if the gain has it too."""
        if self.is_fused:
            return rms_norm_autograd(x_BTD, self.gain, self.epsilon)
        return _normalize(x_BTD, self.epsilon) * self.gain


def _normalize(x_BTD: Tensor, epsilon: float) -> Tensor:
    wide_BTD = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
    mean_square_BT1 = wide_BTD.square().mean(-1, keepdim=True)
    normed_BTD = wide_BTD * torch.rsqrt(mean_square_BT1 + epsilon)
    return normed_BTD.to(x_BTD.dtype)
