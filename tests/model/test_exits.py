"""Exit criteria measure what the published code measured, and forget rows that have left.

Tolerance 2e-5, that of every forward value in test_parity.py; argmax-stability counts exactly.
"""

import pytest
import torch

from pretrain.errors import ConfigError
from pretrain.model.decoding import DEFAULT_THRESHOLDS, Decoding, Exit
from pretrain.model.depth import Depth
from pretrain.model.exits import Watch

CRITERIA = [each for each in Exit if each is not Exit.none]


@torch.no_grad()
def checks(golden):
    """(state, last token's logits) after 1, 2, ... 7 iterations of the published prompt."""
    tokens, start = golden.values["input_ids"], golden.values["initial_state"]
    for steps in range(1, 8):
        output = golden.model(tokens, [Depth(steps, 0)] * len(tokens), initial_state=start)
        yield output.state, output.logits[:, -1]


@pytest.mark.parametrize("exit", CRITERIA)
def test_every_criterion_agrees_with_the_published_code(golden, exit):
    size = golden.model.config.vocabulary_size
    watch = Watch(exit, golden.values["initial_state"], size)
    found = torch.stack([watch.values(*check) for check in checks(golden)])
    theirs = golden.values[f"exit.{exit.value}"]
    torch.testing.assert_close(found, theirs, atol=2e-5, rtol=0.0)
    assert len(theirs.unique()) > 1


@pytest.mark.parametrize("exit", CRITERIA)
def test_rows_that_stay_measure_the_same_after_others_have_left(golden, exit):
    size = golden.model.config.vocabulary_size
    watch = Watch(exit, golden.values["initial_state"], size)
    for step, (state, logits) in enumerate(checks(golden)):
        if step == 3:
            watch.keep([1])
        rows = [0, 1] if step < 3 else [1]
        values = watch.values(state[rows], logits[rows])
        torch.testing.assert_close(
            values, golden.values[f"exit.{exit.value}"][step, rows], atol=2e-5, rtol=0.0
        )


def test_small_values_exit_but_for_stability_where_many_checks_do():
    values = torch.tensor([4.0, 5.0, 6.0])
    start = torch.zeros(3, 1, 2)
    assert Watch(Exit.kl, start, 4).is_enough(values, 5.0).tolist() == [True, False, False]
    stable = Watch(Exit.argmax_stability, start, 4)
    assert stable.is_enough(values, 5.0).tolist() == [False, True, True]


def test_thresholds_default_to_the_published_ones():
    assert {each: each for each in CRITERIA}.keys() == DEFAULT_THRESHOLDS.keys()
    options = {"num_steps": 4, "max_new_tokens": 1}
    assert Decoding(**options, exit=Exit.latent_diff).threshold == 0.03
    assert Decoding(**options, exit=Exit.latent_diff, exit_threshold=0.5).threshold == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_steps": 2}, "min_steps=2 would do nothing with exit=none"),
        ({"exit_threshold": 0.1, "check_every": 3}, "exit_threshold=0.1, check_every=3 would do"),
        ({"exit": Exit.kl, "exit_threshold": 0.0}, "exit_threshold=0.0 must be above 0"),
        ({"exit": Exit.kl, "exit_threshold": float("nan")}, "exit_threshold=nan"),
        ({"exit": Exit.kl, "min_steps": 4}, "min_steps=4 and check_every=1 leave .* before 4"),
        ({"exit": Exit.kl, "check_every": 9}, "check_every=9 leave"),
        ({"exit": Exit.kl, "min_steps": 0}, "min_steps=0 must be at least 1"),
    ],
)
def test_exits_that_could_not_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Decoding(**{"num_steps": 4, "max_new_tokens": 3, **changes})
