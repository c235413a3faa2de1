"""Positions and masks mean what their specification says."""

import torch

from pretrain.model.layout import Mask, split_documents

CPU = torch.device("cpu")


def test_positions_restart_in_each_document_and_in_padding():
    documents = torch.tensor([[0, 0, 0, 1, 2, 2, -1, -1], [0, 0, 1, 1, 1, 1, 1, 1]])
    segments, positions = split_documents(documents)
    assert positions.tolist() == [[0, 1, 2, 0, 0, 1, 0, 1], [0, 1, 0, 1, 2, 3, 4, 5]]
    assert segments.tolist() == [[1, 1, 1, 2, 3, 3, 4, 4], [1, 1, 2, 2, 2, 2, 2, 2]]


def test_no_query_is_left_without_a_key():
    documents = torch.tensor([[0, 1, 1, -1, -1]])
    mask = Mask(segments_BT=split_documents(documents)[0])
    allowed = mask.allowed(5, CPU)[0, 0]
    assert allowed.any(-1).all()
    # Padding sees padding only, and nobody sees padding.
    assert allowed.int().tolist() == [
        [1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def test_queries_behind_cached_keys_see_up_to_their_own_positions():
    whole = Mask().allowed(5, CPU)[0, 0]
    late = Mask(positions_BT=torch.tensor([[3, 4], [1, 2]]))
    assert torch.equal(late.allowed(5, CPU)[:, 0], torch.stack([whole[3:], whole[1:3]]))
    swapped = late.rows(torch.tensor([1]))
    assert torch.equal(swapped.allowed(5, CPU)[0, 0], whole[1:3])


def test_a_prefix_within_documents_stays_in_its_document():
    mask = Mask(segments_BT=torch.tensor([[1, 1, 2, 2]]), prefixes_B=torch.tensor([2]))
    assert mask.allowed(4, CPU)[0, 0].int().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 1, 1],
    ]


def test_rows_of_a_mask_keep_their_own_documents():
    mask = Mask(segments_BT=torch.tensor([[1, 1], [1, 2]]), prefixes_B=torch.tensor([0, 2]))
    swapped = mask.rows(torch.tensor([1, 0]))
    whole = mask.allowed(2, CPU)
    assert torch.equal(swapped.allowed(2, CPU), whole[[1, 0]])
    assert not mask.is_causal
    assert Mask().is_causal
