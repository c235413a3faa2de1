"""Rows become micro-batches: deepest first, labels right, states keyed by global row."""

import dataclasses

import torch

from pretrain.data.loader import Batch
from pretrain.loop.micro_batches import labels_of, micro_batches, row_checksum
from pretrain.model.config import DocumentMask, ModelConfig
from pretrain.model.depth import Depth
from pretrain.model.digits import digit_shifts
from pretrain.model.initial_state import initial_states
from pretrain.model.loss import IGNORED

MODEL = ModelConfig(
    name="test", width=16, heads=2, inner=16, prelude_layers=1, core_layers=1, coda_layers=1,
    vocabulary_size=64, context=4,
)  # fmt: skip
DEPTHS = [Depth(0, 2), Depth(3, 4), Depth(0, 4), Depth(9, 4), Depth(0, 2)]


def make_batch(first_row: int = 100) -> Batch:
    tokens = torch.arange(25).view(5, 5) + 1
    documents = torch.tensor([[0, 0, 1, 1, -1]]).repeat(5, 1)
    return Batch(first_row=first_row, tokens_BS=tokens, documents_BS=documents)


def cut(batch: Batch, micro_rows: int) -> list:
    return list(
        micro_batches(
            batch, DEPTHS, model=MODEL, micro_rows=micro_rows, seed=5, device=torch.device("cpu")
        )
    )


def test_deepest_rows_run_first_and_none_is_lost() -> None:
    batch = make_batch()
    parts = cut(batch, 2)
    assert [depth.total for part in parts for depth in part.depths] == [13, 7, 4, 2, 2]
    seen = torch.cat([part.tokens_BT for part in parts])
    assert torch.equal(seen, batch.tokens_BS[[3, 1, 2, 0, 4], :-1])
    assert [len(part.depths) for part in parts] == [2, 2, 1]


def test_initial_states_belong_to_global_rows() -> None:
    parts = cut(make_batch(), 5)
    expected = initial_states([103, 101, 102, 100, 104], seed=5, context=4, width=16)
    assert torch.equal(parts[0].initial_state_BTD, expected)
    assert not torch.equal(expected[0], expected[1])


def test_shifts_of_places_belong_to_global_rows() -> None:
    assert cut(make_batch(), 5)[0].digit_shift_B is None
    model = dataclasses.replace(MODEL, digit_positions=9)
    (part,) = micro_batches(
        make_batch(), DEPTHS, model=model, micro_rows=5, seed=5, device=torch.device("cpu")
    )
    assert torch.equal(part.digit_shift_B, digit_shifts([103, 101, 102, 100, 104], seed=5))


def test_labels_are_the_next_tokens_without_padding() -> None:
    batch = make_batch()
    assert labels_of(batch, DocumentMask.causal)[0].tolist() == [2, 3, 4, IGNORED]
    assert labels_of(batch, DocumentMask.isolated)[0].tolist() == [2, IGNORED, 4, IGNORED]


def test_checksum_adds_up_over_ranks_and_sees_every_change() -> None:
    whole = make_batch()
    halves = [
        Batch(first_row=100, tokens_BS=whole.tokens_BS[:2], documents_BS=whole.documents_BS[:2]),
        Batch(first_row=102, tokens_BS=whole.tokens_BS[2:], documents_BS=whole.documents_BS[2:]),
    ]
    assert row_checksum(whole) == sum(row_checksum(half) for half in halves)
    swapped = Batch(
        first_row=100,
        tokens_BS=whole.tokens_BS[[1, 0, 2, 3, 4]],
        documents_BS=whole.documents_BS,
    )
    assert row_checksum(swapped) != row_checksum(whole)
    assert row_checksum(make_batch(first_row=101)) != row_checksum(whole)
