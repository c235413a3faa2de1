"""What lm-evaluation-harness passes is understood, or refused with what would be right."""

from pathlib import Path
from typing import Any

import pytest

from pretrain.compose import load
from pretrain.engine.config import Device
from pretrain.errors import ConfigError
from pretrain.harness.config import ModelOptions, model_options
from pretrain.harness.wishes import Sampling, Wish, read_wish
from pretrain.model.decoding import Exit

# what its command line adds if nobody says anything
FLAGS = {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"}


def test_arguments_become_options() -> None:
    assert model_options(FLAGS | {"run_dir": "R"}) == ModelOptions(
        run_dir="R", num_steps=32, batch_size=1, device=Device.auto
    )
    given = {"run_dir": 7, "num_steps": 4, "checkpoint": 20, "exit": "latent_diff",
             "exit_threshold": 1, "batch_size": "auto:4", "max_batch_size": 8,
             "device": "cpu"}  # fmt: skip
    assert model_options(given) == ModelOptions(
        run_dir="7",
        num_steps=4,
        checkpoint=20,
        exit=Exit.latent_diff,
        exit_threshold=1.0,
        batch_size=8,
        device=Device.cpu,
    )
    assert model_options({"run_dir": "R", "batch_size": "auto"}).batch_size is None
    assert model_options({"run_dir": "R", "exit": "minp-kl"}).exit is Exit.minp_kl


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, r"needs a run folder: --model_args run_dir=FOLDER"),
        ({"run": "R"}, r"run='R' is unknown; --model recurrent takes run_dir, num_steps"),
        ({"run_dir": "R", "num_steps": 0}, r"num_steps=0 must be at least 1"),
        ({"run_dir": "R", "num_steps": 4.5}, r"num_steps=4.5 must be a whole number"),
        ({"run_dir": "R", "checkpoint": "last"}, r"checkpoint='last' must be a whole number"),
        ({"run_dir": "R", "exit": "soon"}, r"exit='soon' is none of none, kl, minp_kl"),
        ({"run_dir": "R", "exit_threshold": 1}, r"exit_threshold=1\.0 would do nothing"),
        ({"run_dir": "R", "exit": "kl", "exit_threshold": "x"}, r"'x' must be a number"),
        ({"run_dir": "R", "batch_size": "big"}, r"--batch_size big is neither a number nor auto"),
        ({"run_dir": "R", "batch_size": 0}, r"batch_size=0 must be at least 1"),
        ({"run_dir": "R", "max_batch_size": 4}, r"4 would do nothing without --batch_size auto"),
        ({"run_dir": "R", "device": "cuda:1"}, r"--device cuda:1: .* CUDA_VISIBLE_DEVICES"),
    ],
)
def test_wrong_arguments_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        model_options(given)


@pytest.mark.parametrize(
    ("given", "wish"),
    [
        ({}, Wish(Sampling(256), ())),
        ({"until": "\n", "max_new_tokens": 8}, Wish(Sampling(8), ("\n",))),
        ({"until": ["a", "", "b"], "max_gen_toks": 7, "max_tokens": 9},
         Wish(Sampling(7), ("a", "b"))),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9, "num_beams": 1},
         Wish(Sampling(256), ())),
        ({"temperature": 0.0}, Wish(Sampling(256), ())),
        ({"temperature": 0.5, "top_p": 0.9}, Wish(Sampling(256, 0.5, None, 0.9), ())),
        ({"do_sample": True, "top_k": 5}, Wish(Sampling(256, 1.0, 5), ())),
    ],
)  # fmt: skip
def test_wishes_are_read(given: dict[str, Any], wish: Wish) -> None:
    assert read_wish(given) == wish


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"min_p": 0.1}, r"have min_p=0\.1; known are do_sample"),
        ({"num_beams": 4}, r"num_beams=4: there is no beam search"),
    ],
)
def test_wishes_that_would_be_ignored_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_wish(given)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("harness.tasks=[]", r"harness\.tasks=\[\] names no file"),
        ("harness.tasks=[a/x.jsonl,b/x.jsonl]", r"names x more than once"),
        ("harness.max_new_tokens=0", r"harness\.max_new_tokens=0 must be at least 1"),
        ("harness.items=0", r"harness\.items=0 must be at least 1"),
    ],
)
def test_tasks_that_cannot_be_written_are_refused(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load("harness", ["harness.tasks=[x.jsonl]", f"harness.to={tmp_path}", override])
