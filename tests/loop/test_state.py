"""A checkpoint says what it belongs to."""

import pytest

from pretrain.errors import DataError
from pretrain.loop.state import TrainState, check_same_data, check_same_tokenizer

SAVED = {"data_fingerprint": "a" * 64, "tokenizer_sha256": "b" * 64}


def test_counters_survive_a_checkpoint() -> None:
    state = TrainState(step=3, rows=48, tokens=1536, skipped_updates=1, lives=2, trained_s=1.5)
    assert TrainState.from_dict(state.as_dict()) == state


def test_its_own_data_and_tokenizer_are_accepted_and_others_named() -> None:
    check_same_data(SAVED, "a" * 64, "shards")
    check_same_tokenizer(SAVED, "b" * 64, "tokenizer")
    check_same_data({"tokenizer_sha256": "b" * 64}, "c" * 64, "an adopted run has read none yet")
    with pytest.raises(DataError, match="data aaaaaaaaaaaa, but shards holds cccccccccccc"):
        check_same_data(SAVED, "c" * 64, "shards")
    with pytest.raises(DataError, match="tokenizer bbbbbbbbbbbb, but out/t holds cccccccccccc"):
        check_same_tokenizer(SAVED, "c" * 64, "out/t")
