"""One transformer layer in the sandwich form: a norm before each branch, one after each sum."""

from torch import Tensor, nn

from pretrain.model.attention import Attention
from pretrain.model.cache import Slot
from pretrain.model.config import ModelConfig
from pretrain.model.layout import Layout
from pretrain.model.mlp import GatedMLP
from pretrain.model.norm import RMSNorm


class SandwichBlock(nn.Module):
    """x <- n2(x + attention(n1 x));  x <- n4(x + mlp(n3 x))   (arXiv 2502.05171, section 3).

    The second and fourth norms take the residual *sum*, which bounds the state of the recurrence.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_1 = RMSNorm(config.width, config.norm_epsilon)
        self.attention = Attention(config)
        self.norm_2 = RMSNorm(config.width, config.norm_epsilon)
        self.norm_3 = RMSNorm(config.width, config.norm_epsilon)
        self.mlp = GatedMLP(config)
        self.norm_4 = RMSNorm(config.width, config.norm_epsilon)

    def forward(self, x_BTD: Tensor, layout: Layout, slot: Slot | None = None) -> Tensor:
        """[B, T, D] of [B, T, D]; with a slot, the tokens continue those already in it."""
        x_BTD = self.norm_2(x_BTD + self.attention(self.norm_1(x_BTD), layout, slot))
        x_BTD = self.norm_4(x_BTD + self.mlp(self.norm_3(x_BTD)))
        return x_BTD
