"""Alarms speak once when a signature appears and once when it has gone, across resumes too."""

import dataclasses
import logging
import math
from typing import Any

import pytest
import torch

from pretrain.config import TrainConfig
from pretrain.data.loader import Batch
from pretrain.engine.world import World
from pretrain.loop.alarms import Alarms
from pretrain.loop.config import AlarmConfig, ValidationConfig
from pretrain.loop.validation import validate
from pretrain.model.config import Block, DepthConfig, Law
from pretrain.model.init import initialize
from pretrain.model.recurrent import RecurrentModel
from pretrain.testing import tiny_config

LN_V = math.log(323)
HEALTHY = {
    "state/token_correlation": 0.2,
    "hidden/token_correlation": 0.4,
    "validation/loss_at_1_nats": 0.5 * LN_V + 0.05,
    "validation/loss_at_mean_nats": 0.5 * LN_V,
}
COLLAPSED = HEALTHY | {"state/token_correlation": 0.97}
COLLAPSED_HEAD = HEALTHY | {"hidden/token_correlation": 0.97}
IGNORED = HEALTHY | {"validation/loss_at_1_nats": 0.5 * LN_V + 0.001}


def config(**limits: Any) -> TrainConfig:
    base = tiny_config()
    validation = dataclasses.replace(base.validation, alarms=AlarmConfig(**limits))
    return dataclasses.replace(base, validation=validation)


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    lines = [(r.levelno, r.getMessage().split(" at step")[0]) for r in caplog.records]
    caplog.clear()
    return lines


def test_one_warning_when_it_begins_and_one_line_when_it_ends(caplog) -> None:
    caplog.set_level(logging.INFO)
    alarms = Alarms(config())
    quiet = {"alarm/collapse": 0, "alarm/ignored_state": 0}
    assert alarms.judge(100, HEALTHY) == quiet
    assert said(caplog) == []
    for result in (COLLAPSED, COLLAPSED_HEAD, COLLAPSED):
        assert alarms.judge(200, result) == quiet | {"alarm/collapse": 1}
    assert said(caplog) == [(logging.WARNING, "alarm collapse begins")]
    assert alarms.judge(300, IGNORED) == quiet | {"alarm/ignored_state": 1}
    assert said(caplog) == [
        (logging.INFO, "alarm collapse ends"), (logging.WARNING, "alarm ignored_state begins"),
    ]  # fmt: skip
    assert alarms.judge(400, HEALTHY) == quiet
    assert said(caplog) == [(logging.INFO, "alarm ignored_state ends")]


def test_a_warning_has_the_numbers_and_the_remedy(caplog) -> None:
    alarms = Alarms(config())
    alarms.judge(100, COLLAPSED)
    alarms.judge(150, IGNORED)
    first, second = (record.getMessage() for record in caplog.records)
    assert "0.970 in the state" in first
    assert "limit 0.9" in first
    assert "optimizer.learning_rate" in first
    assert "depth 4 is 0.0010 nats better than depth 1" in second
    assert "model.block=sandwich" in second


@pytest.mark.parametrize(
    ("step", "result"),
    [
        (19, COLLAPSED),
        (19, IGNORED),
        # a model that knows next to nothing yet
        (500, IGNORED | {"validation/loss_at_1_nats": 0.85 * LN_V,
                         "validation/loss_at_mean_nats": 0.85 * LN_V}),
        # diverged: another guard's business
        (500, dict.fromkeys(HEALTHY, math.nan)),
    ],
)  # fmt: skip
def test_no_alarm_where_the_signature_means_nothing(step, result, caplog) -> None:
    assert sum(Alarms(config()).judge(step, result).values()) == 0
    assert not caplog.records


def test_a_mean_depth_of_one_has_nothing_to_gain() -> None:
    fixed = dataclasses.replace(
        config(), depth=DepthConfig(law=Law.fixed, mean=1, backprop=1), batch=tiny_config().batch
    )
    assert Alarms(fixed).judge(500, IGNORED)["alarm/ignored_state"] == 0


def test_a_resumed_run_does_not_repeat_what_was_said(caplog) -> None:
    caplog.set_level(logging.INFO)
    earlier = [{"step": 2, "alarm/collapse": 1, "alarm/ignored_state": 0}, {"step": 3}]
    alarms = Alarms(config(), earlier)
    assert alarms.judge(100, COLLAPSED)["alarm/collapse"] == 1
    assert said(caplog) == []
    alarms.judge(200, HEALTHY)
    assert said(caplog) == [(logging.INFO, "alarm collapse ends")]
    ended = Alarms(config(), [*earlier, {"step": 4, "alarm/collapse": 0, "alarm/ignored_state": 0}])
    ended.judge(300, COLLAPSED)
    assert said(caplog) == [(logging.WARNING, "alarm collapse begins")]


@pytest.mark.parametrize(
    ("limits", "result", "name"),
    [
        ({"collapse_correlation": 0.3}, HEALTHY, "collapse"),
        ({"ignored_gain_nats": 0.1}, HEALTHY, "ignored_state"),
        ({"ignored_loss_share": 0.4}, IGNORED, None),
        ({"after_steps": 201}, COLLAPSED, None),
    ],
)
def test_every_limit_counts(limits: dict[str, float], result, name: str | None) -> None:
    found = Alarms(config(**limits)).judge(200, result)
    assert [key for key, is_on in found.items() if is_on] == ([f"alarm/{name}"] if name else [])


def measure(change, **form: Any) -> tuple[TrainConfig, dict[str, Any]]:
    """The validation of an untrained model that `change` gives a signature; nothing is mocked."""
    base = tiny_config(validation=ValidationConfig(every_steps=1, rows=4, depths=[2]))
    base = dataclasses.replace(
        base, model=dataclasses.replace(base.model, context=32, **form),
        data=dataclasses.replace(base.data, context=32),
    )  # fmt: skip
    model = RecurrentModel(base.model)
    initialize(model, mean_depth=4, seed=0)
    with torch.no_grad():
        change(model)
    tokens = torch.randint(323, (4, 33), generator=torch.Generator().manual_seed(0))
    batch = Batch(0, tokens, torch.zeros_like(tokens))
    world = World(0, 1, 0, torch.device("cpu"))
    return base, validate(model, base, world, batch, depths=[2], diagnose_depth=4)


def test_an_untrained_model_gives_no_alarm_even_without_patience() -> None:
    base, result = measure(lambda model: None)
    assert result["state/token_correlation"] < 0.2
    limits = dataclasses.replace(base.validation, alarms=AlarmConfig(after_steps=0))
    alarms = Alarms(dataclasses.replace(base, validation=limits))
    assert sum(alarms.judge(1, result).values()) == 0


def test_a_model_made_to_collapse_is_recognised() -> None:
    """Constructed: one embedding for all tokens, and an adapter that drops the random start."""

    def collapse(model: RecurrentModel) -> None:
        model.embedding.weight.copy_(model.embedding.weight[:1].expand_as(model.embedding.weight))
        model.core.iteration.adapter[:, :24] = 0

    base, result = measure(collapse)
    assert result["state/token_correlation"] > 0.95
    assert Alarms(base).judge(100, result) == {"alarm/collapse": 1, "alarm/ignored_state": 0}


def test_a_model_made_to_ignore_its_state_is_recognised() -> None:
    """Constructed: an adapter without the state's half; the loss is set below the limit by hand."""

    def ignore(model: RecurrentModel) -> None:
        model.core.iteration.adapter[:, :24] = 0

    base, result = measure(ignore, block=Block.pre_norm)
    one, mean = result["validation/loss_at_1_nats"], result["validation/loss_at_mean_nats"]
    assert one == pytest.approx(mean, abs=1e-6)
    assert result["state/relative_residual"] < 1e-6
    assert Alarms(base).judge(100, result)["alarm/ignored_state"] == 0, "the model is untrained"
    trained = result | {
        "validation/loss_at_1_nats": one - mean / 2,
        "validation/loss_at_mean_nats": mean / 2,
    }
    assert Alarms(base).judge(100, trained) == {"alarm/collapse": 0, "alarm/ignored_state": 1}
