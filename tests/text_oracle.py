"""What generation is compared with: one token after another, nothing batched, nothing sliced."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pretrain.model.recurrent import RecurrentModel
from pretrain.model.rotary import angles, rotate

PROMPTS = [[3, 1, 4, 1], [5, 9, 2, 6]]
UNEVEN = [[3, 1, 4, 1], [5], [9, 2], [6, 5, 3, 5, 8, 9]]


@torch.no_grad()
def naive_logits(model: RecurrentModel, tokens: list[int], depths: list[int]) -> Tensor:
    """Logits [T, V] of a text whose token i is iterated depths[i] times from a zero state.

    In iteration t a token attends to what earlier ones had in their iteration t, or in their last.
    """
    seen: dict[tuple[str, int], list[list[tuple[Tensor, Tensor]]]] = {}
    found = []
    for position, (token, depth) in enumerate(zip(tokens, depths, strict=True)):
        e = model.embedding(torch.tensor([[token]]))
        e = run(model.prelude, e, seen, "prelude", position, 0)
        state = torch.zeros_like(e)
        for iteration in range(depth):
            x = torch.cat((state, e), -1) @ model.core.iteration.adapter.T
            state = run(model.core.iteration.layers, x, seen, "core", position, iteration)
        x = run(model.coda, model.final_norm(state), seen, "coda", position, 0)
        found.append(model.embedding(None, model.final_norm(x))[0, 0])
    return torch.stack(found)


def run(layers, x, seen, part, position, iteration) -> Tensor:
    for index, block in enumerate(layers):
        texts = seen.setdefault((part, index), [])
        if len(texts) == position:
            texts.append([])
        mixed = attention(block.attention, block.norm_1(x), texts, iteration)
        x = block.norm_2(x + mixed)
        x = block.norm_4(x + block.mlp(block.norm_3(x)))
    return x


def attention(layer, x, texts, iteration) -> Tensor:
    q, k, v = (x @ layer.qkv.T).view(3, 1, 1, layer.heads, -1)
    turn = angles(torch.tensor([[len(texts) - 1]]), head_width=q.shape[-1], base=50_000.0)
    texts[-1].append((rotate(k + layer.qk_bias[1], *turn), v))
    q = rotate(q + layer.qk_bias[0], *turn)[0, 0]
    keys, values = zip(*(each[min(iteration, len(each) - 1)] for each in texts), strict=True)
    scores = torch.einsum("hk,shk->hs", q, torch.cat(keys)[:, 0]) / math.sqrt(q.shape[-1])
    mixed = torch.einsum("hs,shk->hk", scores.softmax(-1), torch.cat(values)[:, 0])
    return (mixed.flatten() @ layer.output.T)[None, None]


@contextmanager
def count_core_tokens(model: RecurrentModel) -> Iterator[list[int]]:
    """Rows times tokens of every single iteration of the core."""
    counted: list[int] = []
    hook = model.core.iteration.register_forward_pre_hook(
        lambda _, inputs: counted.append(inputs[0].shape[0] * inputs[0].shape[1])
    )
    yield counted
    hook.remove()
