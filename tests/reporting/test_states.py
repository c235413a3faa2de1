from pathlib import Path

import pytest
import torch

from conftest import SMALL, run_cli
from pretrain.errors import ConfigError
from pretrain.loop.trained import load_trained
from pretrain.loop.validation import STATE_SEED
from pretrain.model.depth import Depth
from pretrain.model.initial_state import initial_states
from pretrain.reporting.states import choose, project, relative_moves, trace


@pytest.fixture(scope="module")
def trained_run(workspace: Path) -> Path:
    done = run_cli(workspace, "train", *SMALL, "run.name=states", "run.steps=2")
    assert done.returncode == 0, done.stdout + done.stderr
    return workspace / "out/runs/states"


def test_states_of_a_trained_run_are_on_its_page(workspace, trained_run):
    done = run_cli(
        workspace, "report", f"run.dir={trained_run}", "report.states=true",
        "report.prompt='state core loop'", "report.iterations=5", "report.to=states.html",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    page = (workspace / "states.html").read_text()
    assert "principal component of s_1 to s_5, step 2" in page
    assert "How soon the states settle" in page


def test_the_traced_states_are_those_of_each_depth(trained_run):
    trained = load_trained(trained_run, torch.device("cpu"), dtype=torch.float32)
    ids, model = [5, 9, 11, 7], trained.config.model
    states = trace(trained, ids, iterations=4)
    start = initial_states([0], seed=STATE_SEED, context=4, width=model.width)
    for depth in (1, 4):
        with torch.no_grad():
            output = trained.model(torch.tensor([ids]), [Depth(depth, 0)], initial_state=start)
        torch.testing.assert_close(states[depth], output.state[0], rtol=0, atol=0)


def test_a_prompt_beyond_the_context_is_refused(trained_run):
    trained = load_trained(trained_run, torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"33 tokens, more than model\.context=32"):
        trace(trained, [1] * 33, iterations=2)


def test_the_plane_of_states_in_a_plane_is_theirs():
    generator = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(16, 2, generator=generator, dtype=torch.float64)).Q.T
    flat = torch.randn(7, 3, 2, generator=generator, dtype=torch.float64)
    start = torch.randn(1, 3, 16, generator=generator, dtype=torch.float64)
    points, share = project(torch.cat([start, flat @ plane + 3.0]))
    assert share == pytest.approx(1)
    distances = torch.cdist(points.flatten(0, 1), points.flatten(0, 1))
    expected = torch.cdist(flat.flatten(0, 1), flat.flatten(0, 1))
    # float64 sums of 16 products of numbers below 10
    torch.testing.assert_close(distances, expected, rtol=0, atol=1e-6)


def test_a_move_is_measured_against_the_state_it_led_to():
    states = torch.tensor([[[3.0, 0.0]], [[0.0, 4.0]], [[0.0, 5.0]]])
    moves = relative_moves(states)
    torch.testing.assert_close(moves, torch.tensor([[5 / 4], [1 / 5]], dtype=torch.float64))


def test_chosen_tokens_reach_from_the_first_to_the_last():
    assert choose(1) == [0]
    assert choose(4) == [0, 1, 2, 3]
    assert choose(26) == [0, 5, 10, 15, 20, 25]
