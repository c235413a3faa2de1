import pytest

from pretrain.engine.config import CheckpointConfig
from pretrain.errors import ConfigError
from pretrain.testing import tiny_engine


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_stage": 0}, "zero_stage=0 must be 1, 2 or 3"),
        ({"bucket_elements": 0}, "bucket_elements=0"),
        ({"timeout_s": 0}, "timeout_s=0"),
        ({"zero3_persistent_elements": -1}, "zero3_persistent_elements=-1"),
    ],
)
def test_what_cannot_run_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_engine(**change)


@pytest.mark.parametrize("field", ["every_steps", "keep_last", "keep_every_steps"])
def test_checkpoint_numbers_are_checked(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}=-1"):
        CheckpointConfig(**({"every_steps": 1} | {field: -1}))
