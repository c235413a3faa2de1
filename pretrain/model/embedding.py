"""The tied embedding: the first and the last thing the model does."""

# B rows  T tokens  D width  V vocabulary

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.model.config import FUSED_CHUNK_TOKENS, ComputePath, ModelConfig
from pretrain.model.loss import divergence, linear_cross_entropy
from pretrain.model.parameter import unset
from pretrain_kernels import linear_cross_entropy as fused


class TiedEmbedding(nn.Module):
    """One matrix E for both ends: scale E[tokens] on the way in, h E^T on the way out.

    Both ends go through `forward`, because an engine that shards weights (ZeRO-3) gathers them
    only around a module's call.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.scale = math.sqrt(config.width) if config.embedding_scale else 1.0
        self.is_fused = config.path is ComputePath.fused
        self.weight = unset(config.vocabulary_size, config.width)

    def forward(
        self,
        tokens_BT: Tensor | None,
        hidden_BTD: Tensor | None = None,
        labels_BT: Tensor | None = None,
        other_BTD: Tensor | None = None,
    ) -> Tensor:
        """Vectors of tokens [B, T, D]; of hidden vectors, the logits [B, T, V] in float32, or,
        with labels, the nats [B, T], or, with others, KL(these || others) in nats [B, T] (logits
        are then never held all at once).
        """
        if tokens_BT is not None:
            return F.embedding(tokens_BT, self.weight) * self.scale
        assert hidden_BTD is not None
        if other_BTD is not None:
            pair = (hidden_BTD.flatten(0, 1), other_BTD.flatten(0, 1))
            return divergence(*pair, self.weight).view(hidden_BTD.shape[:2])
        if labels_BT is None:
            logits_BTV = F.linear(hidden_BTD, self.weight)
            return logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
        # rows of one token flatten to a view with gaps, which the fused head does not take
        flat = hidden_BTD.flatten(0, 1).contiguous(), self.weight, labels_BT.flatten().contiguous()
        if self.is_fused:
            nats_N = fused.linear_cross_entropy(*flat, chunk_tokens=FUSED_CHUNK_TOKENS)
        else:
            nats_N = linear_cross_entropy(*flat)
        return nats_N.view_as(labels_BT)
