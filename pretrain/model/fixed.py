"""A stretch of passes in which no weight changes: what follows from weights alone is made once."""

import contextlib
from collections.abc import Iterator

from torch import nn

from pretrain.model.block import SandwichBlock
from pretrain.model.fused.weights import Float8Copies


@contextlib.contextmanager
def fixed_weights(model: nn.Module) -> Iterator[None]:
    """Inside, each weight that multiplies in float8 is quantized once, and its copy stays.

    It may be entered again inside; the outermost exit drops the copies, also after an exception.
    For weights that are whole and stay where they are: not where each pass gathers them anew
    (ZeRO-3). A pass raises RuntimeError if it finds that one has changed all the same.
    """
    with contextlib.ExitStack() as stack:
        for copies in _copies(model):
            stack.enter_context(copies.held())
        yield


def has_fixed_weights(model: nn.Module) -> bool:
    """Whether writing to a weight now would leave a stale copy."""
    return any(copies.is_held for copies in _copies(model))


def _copies(model: nn.Module) -> Iterator[Float8Copies]:
    return (block.float8_copies for block in model.modules() if isinstance(block, SandwichBlock))
