"""How far this project's numbers are from the published model's; prints the table's first columns.

    python tests/golden/measure.py

docs/numerics.md states these errors with their tolerances, and tests/test_numerics.py measures
them again.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from pretrain.model.decoding import Decoding, Exit, StateStart
from pretrain.model.depth import Depth
from pretrain.model.exits import Watch
from pretrain.model.generation import collect, generate_rows
from pretrain.model.huggingface.weights import hugging_face_name, load_pretrained
from pretrain.model.reading import Decoder
from pretrain.model.recurrent import RecurrentModel
from pretrain.optim.ellis_adam import EllisAdam

GOLDEN = Path(__file__).parent
MODELS = ("a_1_2_1_d96", "b_2_4_2_d48")
FACTORS = (0.25, 0.5, 0.75, 1, 1, 0.5)
OPTIMIZERS = {"final": (4e-5, 4e-5), "amplified": (3e-3, 0.05)}


def errors() -> dict[str, float]:
    """The largest error of each quantity over the fixtures."""
    found: dict[str, list[float]] = {}
    for quantity, error in _all_errors():
        assert error == error, f"{quantity} is NaN"
        found.setdefault(quantity, []).append(error)
    return {quantity: max(each) for quantity, each in found.items()}


def _all_errors() -> Iterator[tuple[str, float]]:
    for name in MODELS:
        folder = GOLDEN / name
        values = load_file(folder / "fixture.safetensors")
        model = load_pretrained(folder)
        yield from _forward_errors(model, values)
        yield from _gradient_errors(model, values)
        yield from _token_errors(model, values)
        yield from _exit_errors(model, values)
    yield from _optimizer_errors()


def _apart(ours: Tensor | None, theirs: Tensor) -> float:
    assert ours is not None
    return float((ours.detach().double() - theirs.double()).abs().max())


def _forward_errors(
    model: RecurrentModel, values: dict[str, Tensor]
) -> Iterator[tuple[str, float]]:
    tokens, start = values["input_ids"], values["initial_state"]
    seen: list[Tensor] = []
    hook = model.core.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for steps in (1, 2, 4, 7):
            output = model(
                tokens,
                [Depth(steps, 0)] * len(tokens),
                initial_state=start,
                labels=values["labels"],
                return_states=steps == 7,
            )
            yield "logits", _apart(output.logits, values[f"logits.r{steps}"])
            yield "latents", _apart(output.latent, values[f"latent.r{steps}"])
            yield "hidden before the head", _apart(output.hidden, values[f"head_hidden.r{steps}"])
            yield "loss", _apart(output.loss, values[f"loss.r{steps}"][0])
    hook.remove()
    yield "prelude", _apart(seen[0], values["prelude_out"])
    for ours, theirs in zip(output.states, values["states"], strict=True):
        yield "states", _apart(ours, theirs)


def _gradient_errors(
    model: RecurrentModel, values: dict[str, Tensor]
) -> Iterator[tuple[str, float]]:
    tokens = values["input_ids"]
    for name, depth in {"n2k3": Depth(2, 3), "n0k5": Depth(0, 5)}.items():
        model.zero_grad()
        output = model(
            tokens,
            [depth] * len(tokens),
            initial_state=values["initial_state"],
            labels=values["labels"],
        )
        output.loss.backward()
        gradients = {
            hugging_face_name(n): p.grad for n, p in model.named_parameters() if p.grad is not None
        }
        norm = torch.cat([g.double().flatten() for g in gradients.values()]).norm()
        theirs = float(values[f"gradnorm.{name}"][0])
        kind = "truncated" if name == "n2k3" else "full"
        yield f"gradient norm, {kind} (relative)", abs(float(norm) - theirs) / theirs
        for key in [key for key in values if name == "n2k3" and key.startswith("grad.")]:
            wanted = values[key]
            error = _apart(gradients[key.removeprefix("grad.")], wanted)
            yield "gradients (of the tensor's largest entry)", error / float(wanted.abs().max())


def _token_errors(model: RecurrentModel, values: dict[str, Tensor]) -> Iterator[tuple[str, float]]:
    prompts = values["gen.prompt"].tolist()
    cases = {
        "gen.tokens": ("greedy tokens with a cache", {"start": StateStart.zeros}),
        "gen.tokens.warmstart": ("greedy tokens, warm start", {"start": StateStart.warm}),
        "gen.tokens.compress-s4": (
            "greedy tokens, shared cache",
            {"start": StateStart.zeros, "cache_iterations": 1},
        ),
        "gen.tokens.compress-s8": (
            "greedy tokens, shared cache",
            {"start": StateStart.zeros, "cache_iterations": 2},
        ),
    }
    for key, (quantity, options) in cases.items():
        if key not in values:
            continue
        decoding = Decoding(num_steps=4, max_new_tokens=12, **options)
        found = prompts[0] + collect(generate_rows(model, prompts, decoding))[0]
        wanted = values[key][0].tolist()
        yield (
            f"{quantity} (wrong ones)",
            float(sum(a != b for a, b in zip(found, wanted, strict=True))),
        )
    tokens = values["gen.tokens"]
    options = Decoding(num_steps=4, max_new_tokens=12, start=StateStart.zeros)
    decoder = Decoder(model, options, rows=1, capacity=18)
    logits = [decoder.read(tokens[:, :6])]
    logits += [decoder.read(tokens[:, i : i + 1]) for i in range(6, 17)]
    yield "logits of each generated token", _apart(torch.cat(logits), values["gen.step_logits"])


def _exit_errors(model: RecurrentModel, values: dict[str, Tensor]) -> Iterator[tuple[str, float]]:
    tokens, start = values["input_ids"], values["initial_state"]
    for criterion in (each for each in Exit if each is not Exit.none):
        watch = Watch(criterion, start, model.config.vocabulary_size)
        for steps, theirs in enumerate(values[f"exit.{criterion.value}"], start=1):
            with torch.no_grad():
                output = model(tokens, [Depth(steps, 0)] * len(tokens), initial_state=start)
            found = watch.values(output.state, output.logits[:, -1])
            yield f"exit criterion {criterion.value}", _apart(found, theirs)


def _optimizer_errors() -> Iterator[tuple[str, float]]:
    golden = load_file(GOLDEN / "optimizer.safetensors")
    for case, (rate, decay) in OPTIMIZERS.items():
        weights = {k: torch.nn.Parameter(golden[f"{case}.{k}.0"].clone()) for k in ("W", "b")}
        groups = [
            {"params": [weights["W"]], "weight_decay": decay},
            {"params": [weights["b"]], "weight_decay": 0.0},
        ]
        optimizer = EllisAdam(groups, lr=rate, weight_decay=decay)
        for step, factor in enumerate(FACTORS, start=1):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            for key, weight in weights.items():
                weight.grad = golden[f"{case}.g{key}.{step}"]
            optimizer.step()
            for key, weight in weights.items():
                yield "ELLISAdam, weights", _apart(weight, golden[f"{case}.{key}.{step}"])
                for moment in ("exp_avg", "exp_avg_sq"):
                    theirs = golden[f"{case}.{key}.{moment}.{step}"]
                    error = _apart(optimizer.state[weight][moment], theirs)
                    # exp_avg_sq of a zero gradient is the floor itself, 1e-12
                    scale = float(theirs.abs().max())
                    yield "ELLISAdam, moments (of the largest entry)", error / scale


if __name__ == "__main__":
    torch.set_num_threads(1)
    for quantity, error in errors().items():
        print(f"| {quantity} | {error:.1e} |")
