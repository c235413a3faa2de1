"""One rank's rows of a step become micro-batches, deepest rows first.

Where ranks meet at every micro-step (ZeRO-2 and 3), micro-step m then has nearly the same depth
on all of them. Only the running order changes; which row has which depth does not.
"""

import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.data.loader import Batch
from pretrain.model.config import DocumentMask, ModelConfig
from pretrain.model.depth import Depth
from pretrain.model.digits import digit_shifts
from pretrain.model.initial_state import initial_states
from pretrain.model.loss import IGNORED

# B rows of a micro-batch  S = context + 1 stored tokens  T = context  D width


class MicroBatch(NamedTuple):
    """What one forward pass takes, on the device."""

    tokens_BT: Tensor
    labels_BT: Tensor
    documents_BT: Tensor
    initial_state_BTD: Tensor
    depths: list[Depth]
    digit_shift_B: Tensor | None
    """None where the model gives digits no places."""


def labels_of(batch: Batch, documents: DocumentMask) -> Tensor:
    """The token after each token, IGNORED where that is padding; int64 [rows, T].

    With isolated documents the first token of the next document is not a label either: nothing
    that the model may look at says which document comes next.
    """
    labels_RT = batch.tokens_BS[:, 1:].masked_fill(batch.documents_BS[:, 1:] < 0, IGNORED)
    if documents is DocumentMask.isolated:
        is_other = batch.documents_BS[:, 1:] != batch.documents_BS[:, :-1]
        labels_RT = labels_RT.masked_fill(is_other, IGNORED)
    return labels_RT


def micro_batches(
    batch: Batch,
    depths: Sequence[Depth],
    *,
    model: ModelConfig,
    micro_rows: int,
    seed: int,
    device: torch.device,
) -> Iterator[MicroBatch]:
    """Micro-batches of `micro_rows` rows, in order of falling depth, with their initial states."""
    labels_RT = labels_of(batch, model.documents)
    order = sorted(range(len(depths)), key=lambda row: (-depths[row].total, row))
    for start in range(0, len(order), micro_rows):
        chosen = order[start : start + micro_rows]
        rows = [batch.first_row + row for row in chosen]
        yield MicroBatch(
            tokens_BT=batch.tokens_BS[chosen, :-1].to(device, non_blocking=True),
            labels_BT=labels_RT[chosen].to(device, non_blocking=True),
            documents_BT=batch.documents_BS[chosen, :-1].to(device, non_blocking=True),
            initial_state_BTD=initial_states(
                rows,
                seed=seed,
                context=model.context,
                width=model.width,
                sigma=model.state_sigma,
                device=device,
            ),
            depths=[depths[row] for row in chosen],
            digit_shift_B=(
                None
                if model.digit_positions is None
                else digit_shifts(rows, seed=seed, device=device)
            ),
        )


def row_checksum(batch: Batch) -> int:
    """Sum over rows of the CRC32 of (global row, tokens).

    A sum, so that ranks may add theirs: equal on any number of ranks for the same step.
    """
    total = 0
    for offset, tokens_S in enumerate(batch.tokens_BS.numpy()):
        row = batch.first_row + offset
        total += zlib.crc32(tokens_S.tobytes(), zlib.crc32(row.to_bytes(8, "little")))
    return total
