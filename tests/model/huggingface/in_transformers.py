"""What Hugging Face transformers makes of exported folders, measured.

A program, so that tests can run it in environments with other versions of transformers:
python in_transformers.py WORK SAVED. WORK holds one folder per model, each with `export` and
`wanted.safetensors`; prints one JSON object and saves each model again in SAVED. The tests judge.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from string import ascii_letters
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

Tensors = dict[str, torch.Tensor]


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.float() - b.float()).abs().max().item()


def load(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Any]]:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, torch_dtype=dtype, output_loading_info=True
    )
    return model.eval(), {kind: sorted(map(str, names)) for kind, names in info.items()}


def greedy(tokens: int, **settings: Any) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=tokens, do_sample=False, **settings)


def forward(model: Any, wanted: Tensors) -> dict[str, float]:
    """Errors of everything the fixture pins."""
    errors = {}
    for key in wanted:
        kind, _, depth = key.partition(".r")
        if kind != "logits" or not depth:
            continue
        output = model(
            wanted["input_ids"],
            input_states=wanted["initial_state"],
            num_steps=int(depth),
            labels=wanted["labels"],
        )
        errors[key] = error(output.logits, wanted[key])
        errors[f"latent.r{depth}"] = error(output.latent_states, wanted[f"latent.r{depth}"])
        errors[f"hidden.r{depth}"] = error(output.hidden_states, wanted[f"head_hidden.r{depth}"])
        errors[f"loss.r{depth}"] = error(output.loss, wanted[f"loss.r{depth}"])
    return errors


def gradients(model: Any, wanted: Tensors) -> dict[str, float]:
    """Norms of truncated and full gradients, and the largest error relative to its tensor."""
    found = {}
    for name, pair in {"n2k3": torch.tensor([2, 3]), "n0k5": (0, 5)}.items():
        model.zero_grad()
        output = model(
            wanted["input_ids"],
            input_states=wanted["initial_state"],
            num_steps=pair,
            labels=wanted["labels"],
        )
        output.loss.backward()
        grads = {key: value.grad for key, value in model.named_parameters()}
        norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
        found[f"norm.{name}"] = (norm / wanted[f"gradnorm.{name}"] - 1).abs().item()
        if name == "n2k3":
            found["tensor"] = max(
                error(grad, wanted[f"grad.{key}"]) / wanted[f"grad.{key}"].abs().max().item()
                for key, grad in grads.items()
            )
    model.zero_grad()
    return found


@torch.no_grad()
def padding(model: Any, wanted: Tensors) -> dict[str, Any]:
    """A short row beside a long one, padded on either side, against the row by itself."""
    ids, states = wanted["input_ids"], wanted["initial_state"]
    length, short = ids.shape[1], ids.shape[1] - 5
    alone = model(ids[1:, :short], input_states=states[1:, :short], num_steps=4).logits[0]
    found: dict[str, Any] = {}
    for side, rows in {"left": slice(5, None), "right": slice(0, short)}.items():
        padded, s_0, mask = ids.clone(), states.clone(), torch.ones_like(ids)
        mask[1] = 0
        padded[1], padded[1, rows] = 7, ids[1, :short]
        s_0[1, rows], mask[1, rows] = states[1, :short], 1
        for name, given in {"mask": mask, "nothing": None}.items():
            output = model(padded, input_states=s_0, attention_mask=given, num_steps=4)
            found[f"{side}.{name}"] = error(output.logits[1, rows], alone)
        both = model(padded, input_states=s_0, attention_mask=mask, num_steps=4)
        found[f"{side}.other row"] = error(
            both.logits[0], model(ids[:1], input_states=states[:1], num_steps=4).logits[0]
        )
        # In two parts: the cache remembers the padding.
        first = model(
            padded[:, :6],
            input_states=s_0[:, :6],
            attention_mask=mask[:, :6],
            num_steps=4,
            use_cache=True,
        )
        second = model(
            padded[:, 6:],
            input_states=s_0[:, 6:],
            attention_mask=mask,
            num_steps=4,
            past_key_values=first.past_key_values,
        )
        parts = torch.cat((first.logits, second.logits), dim=1)
        found[f"{side}.parts"] = error(parts[1, rows], alone)
        found["read"] = second.past_key_values.get_seq_length() == length
    nothing = model(ids, attention_mask=torch.zeros_like(ids), num_steps=4).logits
    found["all padding is finite"] = bool(nothing.isfinite().all())
    return found


def letters(first: list[int], size: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that spells the first ids as letters."""
    ids = sorted(range(size), key=lambda token: (token not in first, token))
    alphabet = sorted(ByteLevel.alphabet(), key=lambda byte: (byte not in ascii_letters, byte))
    unreachable = [f"{byte}{byte}" for byte in alphabet]
    vocabulary = dict(zip(alphabet + unreachable, ids, strict=False))
    tokenizer = Tokenizer(BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def generation(model: Any, wanted: Tensors) -> dict[str, Any]:
    """Greedy tokens of the fixture, in every way to get them."""
    prompt, tokens = wanted["gen.prompt"], wanted["gen.tokens"]
    new = tokens.shape[1] - prompt.shape[1]
    depth = {"num_steps": 4, "init_scale": 0.0}
    start = prompt.shape[1]
    # Not in the prompt: without a mask, transformers takes such tokens for padding.
    pad = next(token for token in range(model.config.vocab_size) if token not in tokens)

    def batch(cut: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompt beside its own end, padded on the left."""
        ids, mask = prompt.repeat(2, 1), torch.ones(2, start, dtype=torch.long)
        ids[1, :cut], mask[1, :cut] = pad, 0
        return ids, mask

    ids, mask = batch(cut=2)
    alone = model.generate(prompt[:, 2:], greedy(new, pad_token_id=pad), **depth)
    together = model.generate(ids, greedy(new, pad_token_id=pad), attention_mask=mask, **depth)
    beams = {
        is_cached: model.generate(prompt, greedy(6, num_beams=3, use_cache=is_cached), **depth)
        for is_cached in (True, False)
    }
    tokenizer = letters(tokens[0, start:].tolist(), model.config.vocab_size)
    stop = tokenizer.decode(tokens[0, start + 2])
    stopped = model.generate(
        prompt, greedy(new, stop_strings=[stop]), tokenizer=tokenizer, pad_token_id=pad, **depth
    )
    first_stop = tokens[0, start:].tolist().index(tokens[0, start + 2].item())
    sampled = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        settings = GenerationConfig(max_new_tokens=8, do_sample=True, top_k=0)
        sampled.append(model.generate(prompt, settings, num_steps=4).tolist())
    return {
        "cached": torch.equal(model.generate(prompt, greedy(new), **depth), tokens),
        "uncached": torch.equal(
            model.generate(prompt, greedy(new, use_cache=False), **depth), tokens
        ),
        "padded row": torch.equal(together[1, start:], alone[0, start - 2 :]),
        "row beside it": torch.equal(together[:1], tokens),
        "beams": torch.equal(beams[True], beams[False]),
        "beams differ from greedy": not torch.equal(beams[True], tokens[:, : start + 6]),
        "stop string": stopped.shape[1] == start + first_stop + 1,
        "sampling repeats": sampled[0] == sampled[1],
        "sampling varies": sampled[0] != sampled[2],
    }


def refusals(model: Any, wanted: Tensors) -> dict[str, str]:
    """What is said about input that makes no sense."""
    ids = wanted["input_ids"]
    long = torch.zeros(1, model.config.block_size + 1, dtype=torch.long)
    foreign = DynamicCache()
    keys = torch.zeros(2, model.config.n_heads, 3, model.config.head_dim)
    foreign.update(keys, keys, 0)

    def deeper() -> None:
        read = model(ids[:, :4], num_steps=2, use_cache=True).past_key_values
        model(ids[:, 4:], num_steps=3, past_key_values=read)

    cases: dict[str, Callable[[], Any]] = {
        f"num_steps={steps!r}": lambda steps=steps: model(ids, num_steps=steps)
        for steps in (0, -1, (0, 0), (3, -1), [1, 2, 3], 1.5, True)
    }
    cases |= {
        "generate num_steps=0": lambda: model.generate(ids, greedy(2), num_steps=0),
        "long": lambda: model(long, num_steps=1),
        "generate long": lambda: model.generate(long, greedy(2), num_steps=1),
        "mask": lambda: model(ids, attention_mask=torch.ones(2, 5)),
        "states": lambda: model(ids, input_states=wanted["initial_state"][:1]),
        "foreign cache": lambda: model(ids, past_key_values=foreign),
        "deeper": deeper,
        "labels": lambda: model(ids, labels=ids, logits_to_keep=1),
        "nothing": lambda: model(num_steps=1),
        "resize": lambda: model.resize_token_embeddings(10),
        "another model": lambda: AutoModelForCausalLM.from_pretrained(
            model.config.name_or_path, trust_remote_code=True, injection_type="add"
        ),
    }
    said = {}
    for name, call in cases.items():
        try:
            call()
            said[name] = "nothing"
        except ValueError as refused:
            said[name] = str(refused)
    return said


def fresh(config: Any) -> dict[str, float]:
    """Standard deviations of a model that was never trained, over those of the paper."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    parts = model.state_dict()
    values = config.init_values
    # A normal cut at three sigma has 0.98658 of its standard deviation.
    return {
        "embedding": parts["transformer.wte.weight"].std().item() / values["std"] / 0.98658,
        "down": parts["transformer.coda.0.mlp.proj.weight"].std().item()
        / values["out_proj"]
        / 0.98658,
        "gain": parts["transformer.ln_f.weight"].mean().item(),
    }


def measure(folder: Path, saved: Path) -> dict[str, Any]:
    wanted = load_file(folder / "wanted.safetensors")
    model, info = load(folder / "export")
    result: dict[str, Any] = {"info": info, "forward": forward(model, wanted)}
    if "gen.prompt" in wanted:
        result |= {
            "gradients": gradients(model, wanted),
            "padding": padding(model, wanted),
            "generation": generation(model, wanted),
            "refusals": refusals(model, wanted),
            "fresh": fresh(model.config),
        }
    narrow, _ = load(folder / "export", torch.bfloat16)
    assert all(value.dtype == torch.bfloat16 for value in narrow.parameters())
    logits = narrow(wanted["far_ids"], input_states=wanted["far_state"], num_steps=4).logits
    result["bfloat16"] = error(logits, wanted["far_logits"])
    model.save_pretrained(saved)
    again, _ = load(saved)
    result["saved"] = max(
        error(value, again.get_parameter(name)) for name, value in model.named_parameters()
    )
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    work, saved = map(Path, sys.argv[1:])
    models = {path.name: measure(path, saved / path.name) for path in sorted(work.iterdir())}
    print(json.dumps({"version": transformers.__version__, "models": models}))
