"""Causal self-attention with rotary positions and a bias on queries and keys."""

# B rows  T tokens  D width  H heads  K head width  S keys, cached ones first

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.model.cache import Slot
from pretrain.model.config import ModelConfig
from pretrain.model.layout import Layout
from pretrain.model.parameter import unset
from pretrain.model.rotary import rotate


class Attention(nn.Module):
    """Wo softmax(q k^T / sqrt(K)) v, where q and k get a bias and then their rotation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        width = config.width
        # Rows: queries, keys, values; within each, one head after the other.
        self.qkv = unset(3 * width, width)
        has_bias = config.qk_bias
        self.qk_bias = unset(2, 1, config.heads, config.head_width) if has_bias else None
        self.output = unset(width, width)

    def forward(self, x_BTD: Tensor, layout: Layout, slot: Slot | None = None) -> Tensor:
        """[B, T, D] of [B, T, D]; with a slot, the tokens also see those already in it."""
        rows, tokens, _ = x_BTD.shape
        qkv_BT3HK = F.linear(x_BTD, self.qkv).view(rows, tokens, 3, self.heads, -1)
        q_BTHK, k_BTHK, v_BTHK = qkv_BT3HK.unbind(2)
        if self.qk_bias is not None:
            q_bias_1HK, k_bias_1HK = self.qk_bias.unbind(0)
            q_BTHK, k_BTHK = q_BTHK + q_bias_1HK, k_BTHK + k_bias_1HK
        q_BTHK = rotate(q_BTHK, layout.cos_BTP, layout.sin_BTP)
        k_BTHK = rotate(k_BTHK, layout.cos_BTP, layout.sin_BTP)
        if slot is not None:
            k_BTHK, v_BTHK = slot.write(k_BTHK, v_BTHK)
        mixed_BTHK = attend(q_BTHK, k_BTHK, v_BTHK, layout)
        return F.linear(mixed_BTHK.flatten(-2), self.output)


def attend(q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, layout: Layout) -> Tensor:
    """Attention of the last T of S tokens, [B, T, H, K], by the kernel that the mask allows."""
    queries, keys = q_BTHK.shape[1], k_BSHK.shape[1]
    is_causal = layout.mask.is_causal
    assert not is_causal or queries in (1, keys), (queries, keys)
    mixed_BHTK = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BSHK.transpose(1, 2),
        v_BSHK.transpose(1, 2),
        attn_mask=None if is_causal else layout.matrix,
        # A single last token sees every key.
        is_causal=is_causal and queries == keys,
    )
    return mixed_BHTK.transpose(1, 2)
