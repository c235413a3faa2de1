"""How the latent states of a prompt's tokens move from iteration to iteration."""

# T tokens  D width  R iterations  C chosen tokens

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pretrain.data.inspect import spell
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import ConfigError
from pretrain.loop.state import check_same_tokenizer
from pretrain.loop.trained import Trained, load_trained
from pretrain.loop.validation import STATE_SEED
from pretrain.model.depth import Depth
from pretrain.model.initial_state import initial_states
from pretrain.reporting.charts import figure, legend, run_colour
from pretrain.reporting.scale import Kind
from pretrain.reporting.svg import Chart, Line, draw

# As many as there are colours.
_CHOSEN_TOKENS = 6


def state_figures(run_dir: Path, prompt: str, *, iterations: int) -> list[str]:
    """Figures of the newest checkpoint: the states' paths in their plane, and how far they move.

    Raises CheckpointError if the run has no checkpoint, ConfigError if the prompt does not fit.
    """
    trained = load_trained(run_dir, torch.device("cpu"), dtype=torch.float32)
    tokenizer = Tokenizer.load(trained.config.tokenizer.path)
    check_same_tokenizer(trained.state, tokenizer.sha256, trained.config.tokenizer.path)
    ids = [tokenizer.special.begin_text, *tokenizer.encode(prompt)]
    states_RTD = trace(trained, ids, iterations=iterations)
    chosen = choose(len(ids))
    labels = [f"{place}: {spell(tokenizer, [ids[place]])!r}" for place in chosen]
    points_RC2, share = project(states_RTD[:, chosen])
    moved_RC = relative_moves(states_RTD)[:, chosen]
    return [_paths(points_RC2, labels, share, trained.step), _moves(moved_RC, labels)]


def trace(trained: Trained, ids: Sequence[int], *, iterations: int) -> Tensor:
    """States s_0 .. s_r of every token of a text, float32 [R + 1, T, D].

    Raises ConfigError if the text is longer than the model's context.
    """
    model = trained.config.model
    if len(ids) > model.context:
        raise ConfigError(
            f"report.prompt has {len(ids)} tokens, more than model.context={model.context}. "
            "Shorten it."
        )
    tokens_1T = torch.tensor([list(ids)])
    with torch.no_grad():
        output = trained.model(
            tokens_1T,
            [Depth(no_grad=iterations, with_grad=0)],
            initial_state=initial_states(
                [0], seed=STATE_SEED, context=len(ids), width=model.width, sigma=model.state_sigma
            ),
            documents=torch.zeros_like(tokens_1T),
            keep_logits=False,
            return_states=True,
        )
    assert output.states is not None
    return torch.cat(output.states)


def choose(tokens: int) -> list[int]:
    """Places of up to six tokens, evenly from the first to the last."""
    count = min(tokens, _CHOSEN_TOKENS)
    return sorted({round(n * (tokens - 1) / max(1, count - 1)) for n in range(count)})


def project(states_RCD: Tensor) -> tuple[Tensor, float]:
    """s_1 .. s_r in the plane of their two principal components [R, C, 2], and its variance share.

    The random s_0 is left out: it says nothing of what the core does.
    """
    after_RCD = states_RCD[1:].double()
    flat_ND = after_RCD.flatten(0, 1)
    centred_ND = flat_ND - flat_ND.mean(0)
    _, sizes, axes_KD = torch.linalg.svd(centred_ND, full_matrices=False)
    points_N2 = centred_ND @ axes_KD[:2].T
    share = float(sizes[:2].square().sum() / sizes.square().sum().clamp(min=1e-300))
    return points_N2.view(*after_RCD.shape[:2], -1), share


def relative_moves(states_RTD: Tensor) -> Tensor:
    """||s_t - s_(t-1)|| / ||s_t|| for t = 1..r, [R, T]."""
    after_RTD = states_RTD[1:].double()
    moved_RT = (after_RTD - states_RTD[:-1].double()).norm(dim=-1)
    return moved_RT / after_RTD.norm(dim=-1).clamp(min=1e-300)


def _paths(points_RC2: Tensor, labels: Sequence[str], share: float, step: int) -> str:
    lines = [
        Line(
            x=points_RC2[:, index, 0].tolist(),
            y=points_RC2[:, index, 1].tolist(),
            colour=run_colour(index),
            label=label,
            has_dots=True,
        )
        for index, label in enumerate(labels)
    ]
    chart = Chart(
        lines=lines,
        x_label="first principal component",
        has_pointers=False,
        height=320,
        description="paths of latent states over iterations, by token",
    )
    note = (
        f"first against second principal component of s_1 to s_{len(points_RC2)}, step {step}; "
        f"they hold {share:.0%} of the variance"
    )
    return figure(
        "Where the states of tokens go, iteration by iteration",
        draw(chart),
        note=note,
        keys=legend(lines),
    )


def _moves(moved_RC: Tensor, labels: Sequence[str]) -> str:
    iterations = list(range(1, len(moved_RC) + 1))
    lines = [
        Line(x=iterations, y=moved_RC[:, index].tolist(), colour=run_colour(index), label=label)
        for index, label in enumerate(labels)
    ]
    chart = Chart(
        lines=lines,
        x_label="iteration",
        y_kind=Kind.log,
        height=320,
        description="relative change of the state against iteration, by token",
    )
    note = "||s_t − s_(t−1)|| / ||s_t||, by iteration"
    return figure("How soon the states settle", draw(chart), note=note, keys=legend(lines))
