"""`pretrain generate` writes text, says what it cost, and refuses what cannot work."""

import logging
from pathlib import Path

import pytest

from conftest import SMALL, run_cli
from pretrain import generate
from pretrain.compose import load
from pretrain.errors import ConfigError

GREEDY = ["generate.prompt='12 + 30 ='", "generate.temperature=0", "generate.num_steps=6"]


@pytest.fixture(scope="module")
def run_dir(workspace: Path) -> Path:
    done = run_cli(workspace, "train", *SMALL, "run.name=generate", "run.steps=2")
    assert done.returncode == 0, done.stderr
    return workspace / "out/runs/generate"


@pytest.fixture
def said(run_dir, workspace, monkeypatch, capsys, caplog):
    """Runs the command and gives the text and the log."""

    def run(*overrides: str) -> tuple[str, str]:
        monkeypatch.chdir(workspace)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            generate.main(load("generate", [f"run.dir={run_dir}", *GREEDY, *overrides]))
        return capsys.readouterr().out, caplog.text

    return run


def test_drafts_and_wide_caches_change_the_cost_and_not_the_text(said):
    plain, log = said("generate.max_new_tokens=12")
    assert plain.startswith("12 + 30 =")
    assert "iterations each (6 to 6)" in log
    assert "tokens/s" in log
    text, log = said("generate.max_new_tokens=12", "generate.draft_steps=2", "generate.lookahead=3")
    assert text == plain
    assert "drafted tokens were accepted" in log
    assert said("generate.max_new_tokens=12", "generate.cache_iterations=6")[0] == plain


def test_options_reach_the_model(said):
    _, log = said("generate.max_new_tokens=4", "generate.schedule=[2,9]")
    assert "iterations each (2 to 9)" in log
    _, log = said("generate.exit=kl", "generate.exit_threshold=1000", "generate.min_steps=3")
    # The first token is chosen by the prompt, which never exits.
    assert "iterations each (3 to 6)" in log
    texts = {said(f"generate.start={start}")[0] for start in ("random", "zeros", "warm")}
    texts |= {said("generate.start=zeros", "generate.cache_iterations=1")[0]}
    assert len(texts) > 1


def test_a_context_that_is_too_short_is_named(said):
    with pytest.raises(ConfigError, match=r"has 4\d tokens, .* context of 32"):
        said("generate.prompt='" + "2" * 41 + "'")
    _, log = said("generate.prompt='" + "2" * 15 + "'", "generate.max_new_tokens=30")
    assert "the context of 32 has room for" in log


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("generate.num_steps=0", "generate: num_steps=0 must be at least 1"),
        ("generate.num_steps=-4", "generate: num_steps=-4 must be at least 1"),
        ("generate.exit=entropy", "generate.exit"),
        ("generate.min_steps=3", "generate: min_steps=3 would do nothing with exit=none"),
        ("generate.lookahead=3", "generate: lookahead=3 would do nothing"),
        ("generate.draft_steps=64", "draft_steps=64 must be below num_steps=32"),
        ("generate.top_k=-1", "generate.top_k=-1"),
    ],
)
def test_bad_options_are_refused_without_a_run(override, message):
    with pytest.raises(ConfigError, match=message):
        load("generate", ["run.dir=none", override])
