"""Text by whole passes of the model, for weights that may be spread over ranks.

Each new token costs a forward pass over all of the text, and every caller makes equally many
passes of equal shapes, whatever is chosen. So an engine that gathers weights around each module's
call (ZeRO-3) sees the same calls on every rank, and nothing is held beside a forward pass: no
second copy of the weights, no cache. The tokens are those of `generation.generate_rows`, which
needs the weights at hand and costs less per token of long texts.
"""

# B rows  T tokens  D width

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pretrain.errors import ConfigError
from pretrain.model.config import ComputePath, ModelConfig
from pretrain.model.decoding import Decoding
from pretrain.model.depth import Depth
from pretrain.model.fused.attention import BLOCK
from pretrain.model.initial_state import initial_states
from pretrain.model.recurrent import Output
from pretrain.model.sampling import choose

# Triton compiles a kernel anew for sizes that 16 does not divide, and float8 products want it so.
_ALIGNED_TOKENS = 16


def row_tokens(prompts: Sequence[Sequence[int]], new_tokens: int) -> int:
    """Tokens of a row in each pass: the longest text that there may be, rounded up."""
    longest = max(map(len, prompts)) + new_tokens - 1
    tokens = -(-longest // _ALIGNED_TOKENS) * _ALIGNED_TOKENS
    # rows of whole blocks would have FlexAttention compiled for their length: see _uncompiled
    return tokens + _ALIGNED_TOKENS if tokens % BLOCK == 0 else tokens


@torch.no_grad()
def continue_in_lockstep(
    forward: Callable[..., Output],
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    depths: Sequence[int],
    *,
    new_tokens: int,
    temperature: float,
    seed: int,
    device: torch.device,
) -> list[list[int]]:
    """`new_tokens` ids behind each prompt, row i iterated depths[i] times; stop ids stop nothing.

    The first ones, up to a stop id, are what `generate` gives a prompt alone with the same seed.
    Raises ConfigError if a prompt is empty, or leaves the context.
    """
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths) < 1 or max(lengths) + new_tokens > config.context:
        raise ConfigError(
            f"prompts of {min(lengths)} to {max(lengths)} tokens + {new_tokens} new ones must lie "
            f"within 1 and model.context={config.context}."
        )
    # what the keys of draws need to know of the options
    options = Decoding(
        num_steps=max(depths), max_new_tokens=new_tokens, temperature=temperature, seed=seed
    )
    tokens_BT = _padded(prompts, new_tokens).to(device)
    rows = len(prompts)
    state_BTD = initial_states(
        [0], seed=seed, context=tokens_BT.shape[1], width=config.width, sigma=config.state_sigma,
        device=device,
    ).repeat(rows, 1, 1)  # fmt: skip
    last_B = torch.tensor(lengths, device=device) - 1
    index_B = torch.arange(rows, device=device)
    new: list[Tensor] = []
    with _uncompiled(config):
        for count in range(new_tokens):
            output = forward(
                tokens_BT,
                [Depth(no_grad=depth, with_grad=0) for depth in depths],
                initial_state=state_BTD,
                documents=torch.zeros_like(tokens_BT),
                logits_at=last_B,
            )
            assert output.logits is not None
            positions = [length + count for length in lengths]
            new.append(choose(output.logits[:, 0], options, rows=[0] * rows, positions=positions))
            if count + 1 < new_tokens:
                last_B = last_B + 1
                tokens_BT[index_B, last_B] = new[-1]
    ids: list[list[int]] = torch.stack(new, dim=1).tolist()
    return ids


def _padded(prompts: Sequence[Sequence[int]], new_tokens: int) -> Tensor:
    """Prompts at the beginning of their rows; no token sees what stands behind it."""
    tokens_BT = torch.zeros(len(prompts), row_tokens(prompts, new_tokens), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = torch.tensor(list(prompt))
    return tokens_BT


def _uncompiled(config: ModelConfig) -> contextlib.AbstractContextManager[object]:
    """Compiled layers run as plain ones here.

    These rows are shorter than those of training: code compiled for both lengths would be found
    first from then on, and training would go on with other kernels than without samples.
    """
    if config.path is not ComputePath.compiled:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
