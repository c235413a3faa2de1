"""One transformer layer, in the published form and in that of a run that failed."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pretrain.model.attention import Attention
from pretrain.model.cache import Slot
from pretrain.model.config import Block, ComputePath, ModelConfig, ProductPrecision
from pretrain.model.fused.block import fused_block
from pretrain.model.fused.weights import Float8Copies
from pretrain.model.layout import Layout
from pretrain.model.mlp import GatedMLP
from pretrain.model.norm import make_norm


def make_block(config: ModelConfig) -> nn.Module:
    """One layer of the model's form."""
    return {Block.sandwich: SandwichBlock, Block.pre_norm: PreNormBlock}[config.block](config)


class SandwichBlock(nn.Module):
    """x <- n2(x + attention(n1 x));  x <- n4(x + mlp(n3 x))   (arXiv 2502.05171, section 3).

    The second and fourth norms take the residual *sum*, which bounds the state of the recurrence.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.path = config.path
        self.is_float8 = config.grad_precision is ProductPrecision.fp8
        self.float8_copies = Float8Copies()
        self.epsilon = config.norm_epsilon
        self.norm_1 = make_norm(config)
        self.attention = Attention(config)
        self.norm_2 = make_norm(config)
        self.norm_3 = make_norm(config)
        self.mlp = GatedMLP(config)
        self.norm_4 = make_norm(config)

    def forward(self, x_BTD: Tensor, layout: Layout, slot: Slot | None = None) -> Tensor:
        """[B, T, D] of [B, T, D]; with a slot, the tokens continue those already in it."""
        if slot is None and self.path is ComputePath.fused:
            copies = self.float8_copies if self.is_float8 else None
            return fused_block(self, x_BTD, layout, self.epsilon, copies=copies)
        if slot is None and self.path is ComputePath.compiled:
            if not layout.mask.is_causal:
                # made here, once for all layers: inside, it would cut the layer's graph in two
                _ = layout.matrix
            return _compiled_sandwich()(self, x_BTD, layout)
        return _sandwich(self, x_BTD, layout, slot)


def _sandwich(
    block: SandwichBlock, x_BTD: Tensor, layout: Layout, slot: Slot | None = None
) -> Tensor:
    x_BTD = block.norm_2(x_BTD + block.attention(block.norm_1(x_BTD), layout, slot))
    x_BTD = block.norm_4(x_BTD + block.mlp(block.norm_3(x_BTD)))
    return x_BTD


@functools.cache
def _compiled_sandwich() -> Callable[[SandwichBlock, Tensor, Layout], Tensor]:
    """One compiled function for all layers: their weights are its inputs."""
    return torch.compile(_sandwich)


class PreNormBlock(nn.Module):
    """x <- x + attention(n1 x);  x <- x + mlp(n2 x): nothing bounds the sum.

    Under it the published recipe learned to ignore the state (arXiv 2502.05171, section 4.3).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_1 = make_norm(config)
        self.attention = Attention(config)
        self.norm_2 = make_norm(config)
        self.mlp = GatedMLP(config)

    def forward(self, x_BTD: Tensor, layout: Layout, slot: Slot | None = None) -> Tensor:
        """[B, T, D] of [B, T, D]; with a slot, the tokens continue those already in it."""
        x_BTD = x_BTD + self.attention(self.norm_1(x_BTD), layout, slot)
        x_BTD = x_BTD + self.mlp(self.norm_2(x_BTD))
        return x_BTD
