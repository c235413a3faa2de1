"""The model is Huginn: everything that the published code computed, from the same weights.

Tolerances: forward values atol 2e-5 (two float32 implementations differ by up to 3.6e-6 here);
gradients 1e-4 of each tensor's largest entry; tokens exactly (the smallest gap between the two
likeliest tokens is 0.0037, 180 times the tolerance of the logits).
"""

import pytest
import torch
from torch import Tensor

from pretrain.model.depth import Depth
from pretrain.model.generation import Decoder, Decoding, StateStart, collect, generate_rows
from pretrain.model.huggingface.weights import hugging_face_name
from pretrain.model.recurrent import Output, RecurrentModel

ATOL = 2e-5


def run(golden, depth: Depth, **options: object) -> Output:
    tokens = golden.values["input_ids"]
    return golden.model(
        tokens,
        [depth] * tokens.shape[0],
        initial_state=golden.values["initial_state"],
        **options,
    )


def assert_close(ours: Tensor | None, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=ATOL, rtol=0.0)


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_logits_latent_hidden_and_loss_agree(golden, steps):
    output = run(golden, Depth(steps, 0), labels=golden.values["labels"])
    assert_close(output.logits, golden.values[f"logits.r{steps}"])
    assert_close(output.latent, golden.values[f"latent.r{steps}"])
    assert_close(output.hidden, golden.values[f"head_hidden.r{steps}"])
    assert_close(output.loss, golden.values[f"loss.r{steps}"][0])
    # Two rows of twelve labels, one ignored.
    assert output.num_labels == 23


def test_every_state_agrees(golden):
    output = run(golden, Depth(7, 0), return_states=True)
    assert len(output.states) == 8
    for ours, theirs in zip(output.states, golden.values["states"], strict=True):
        assert_close(ours, theirs)
    assert_close(output.state, golden.values["states"][7])


def test_prelude_agrees(golden):
    seen = []
    golden.model.core.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    run(golden, Depth(1, 0))
    assert_close(seen[0], golden.values["prelude_out"])


def gradients(model: RecurrentModel) -> dict[str, Tensor]:
    return {hugging_face_name(name): value.grad for name, value in model.named_parameters()}


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("keep_logits", [False, True])
def test_truncated_gradients_of_every_parameter_agree(golden, is_checkpointed, keep_logits):
    golden.model.kept_iterations = 0 if is_checkpointed else None
    output = run(golden, Depth(2, 3), labels=golden.values["labels"], keep_logits=keep_logits)
    output.loss.backward()
    assert_close(output.loss.detach(), golden.values["loss.n2k3"][0])
    if keep_logits:
        assert_close(output.logits.detach(), golden.values["logits.n2k3"])
    ours = gradients(golden.model)
    theirs = {
        name.removeprefix("grad."): value
        for name, value in golden.values.items()
        if name.startswith("grad.")
    }
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        atol = 1e-4 * gradient.abs().max().item()
        torch.testing.assert_close(ours[name], gradient, atol=atol, rtol=0.0, msg=name)


@pytest.mark.parametrize(("name", "depth"), [("n2k3", Depth(2, 3)), ("n0k5", Depth(0, 5))])
def test_truncation_changes_the_gradient_as_published(golden, name, depth):
    run(golden, depth, labels=golden.values["labels"]).loss.backward()
    norm = torch.cat([g.double().flatten() for g in gradients(golden.model).values()]).norm()
    torch.testing.assert_close(
        norm, golden.values[f"gradnorm.{name}"][0].double(), rtol=1e-5, atol=0.0
    )


def test_truncated_and_full_gradients_differ(golden):
    truncated, full = golden.values["gradnorm.n2k3"], golden.values["gradnorm.n0k5"]
    assert abs(truncated - full) / full > 1e-3


def decode(golden, **options: object) -> list[int]:
    prompts = golden.values["gen.prompt"].tolist()
    decoding = Decoding(num_steps=4, max_new_tokens=12, **options)
    return prompts[0] + collect(generate_rows(golden.model, prompts, decoding))[0]


def test_greedy_tokens_agree(golden):
    assert decode(golden, start=StateStart.zeros) == golden.values["gen.tokens"][0].tolist()


def test_warm_started_tokens_agree(golden):
    tokens = golden.values["gen.tokens.warmstart"][0].tolist()
    assert decode(golden, start=StateStart.warm) == tokens


@pytest.mark.parametrize(("slots", "cache_iterations"), [(4, 1), (8, 2)])
def test_tokens_with_a_shared_cache_agree(golden, slots, cache_iterations):
    if golden.model.config.core_layers != 4:
        assert f"gen.tokens.compress-s{slots}" not in golden.values
        return
    tokens = golden.values[f"gen.tokens.compress-s{slots}"][0].tolist()
    found = decode(golden, start=StateStart.zeros, cache_iterations=cache_iterations)
    assert found == tokens


def test_step_logits_agree(golden):
    tokens = golden.values["gen.tokens"]
    options = Decoding(num_steps=4, max_new_tokens=12, start=StateStart.zeros)
    decoder = Decoder(golden.model, options, rows=1, capacity=18)
    logits = [decoder.read(tokens[:, :6])]
    logits += [decoder.read(tokens[:, index : index + 1]) for index in range(6, 17)]
    assert_close(torch.cat(logits), golden.values["gen.step_logits"])
