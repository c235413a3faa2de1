"""The gated MLP (SwiGLU)."""

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.model.config import ModelConfig
from pretrain.model.parameter import unset


class GatedMLP(nn.Module):
    """down (SiLU(gate x) * up x)   (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Rows: gate, then up.
        self.gate_up = unset(2 * config.inner, config.width)
        self.down = unset(config.width, config.inner)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] of [B, T, D]."""
        gate_BTI, up_BTI = F.linear(x_BTD, self.gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate_BTI) * up_BTI, self.down)
