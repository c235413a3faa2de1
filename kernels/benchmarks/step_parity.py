"""What a path must show before its speed is printed: gradients as exact as the plain modules'.

The plain modules in float32 are the reference. A path in bf16 passes if the relative error of each
parameter's gradient is at most 1.25 times that of the plain modules in bf16 (the error-ratio rule).
"""

import copy
import csv
import dataclasses
import gc
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.config import ComputePath, ModelConfig, ProductPrecision
from pretrain.model.depth import Depth
from pretrain.model.init import initialize
from pretrain.model.recurrent import RecurrentModel

TOKENS = 512
DEPTHS = [Depth(3, 2), Depth(1, 2)]
RATIO = 1.25
# Gradients that are sums of few terms scatter: below this relative error no ratio is asked for.
NOISE = 2e-3
# Lengths of a prefix whose float8 is compared with bf16 at fixed weights, and how near it must be:
# least cosine of a token's state, most nats of the loss.
PREFIXES, LEAST_COSINE, MOST_NATS = (8, 24, 56), 0.999, 1e-3


def check_path(config: ModelConfig, device: torch.device, results: Path, tag: str = "") -> bool:
    """Whether a path passes; prints the worst parameters. `tag` goes into the file's name."""
    small = dataclasses.replace(config, prelude_layers=1, core_layers=2, coda_layers=1)
    plain = dataclasses.replace(
        small, path=ComputePath.reference, no_grad_precision=ProductPrecision.same,
        grad_precision=ProductPrecision.same,
    )  # fmt: skip
    with device:
        model = RecurrentModel(plain)
    initialize(model, mean_depth=32, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            # gains are 1 and biases 0 at the start, which would hide a mistake
            if parameter.ndim != 2:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            parameter.copy_(parameter.bfloat16())
    inputs = random_inputs(small, device)
    exact = gradients(copy.deepcopy(model), inputs)
    rounded = errors(gradients(model.bfloat16(), inputs), exact)
    weights = model.state_dict()
    del model
    gc.collect()
    with device:
        other = RecurrentModel(small).bfloat16()
    other.load_state_dict(weights)
    found = errors(gradients(other, inputs), exact)
    del other, exact
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    precisions = f"{config.no_grad_precision.value}-{config.grad_precision.value}"
    name = (
        f"{config.name} {config.path.value}{tag}, precision without and with gradient {precisions}"
    )
    # three bits of mantissa instead of seven: half a unit in the last place is 16 times as large
    limit = RATIO if config.grad_precision is ProductPrecision.same else 16.0
    ratios = {key: found[key] / max(rounded[key], NOISE) for key in found}
    worst = sorted(ratios, key=lambda key: -ratios[key])[:4]
    is_good = all(ratio <= limit for ratio in ratios.values())
    print(f"{name}: {'passes' if is_good else 'FAILS'}; worst of {len(ratios)} gradients:")
    for key in worst:
        print(f"  {key}: error {found[key]:.2e}, plain bf16 {rounded[key]:.2e}", flush=True)
    file_name = f"step-parity-{config.name}-{config.path.value}-{precisions}{tag}.csv"
    with (results / file_name).open("w", newline="") as file:
        rows = [(key, f"{found[key]:.3e}", f"{rounded[key]:.3e}") for key in found]
        csv.writer(file).writerows([("gradient", "error", "plain_bf16_error"), *rows])
    return is_good


def random_inputs(config: ModelConfig, device: torch.device) -> dict[str, Tensor]:
    """Two rows of fresh random tokens."""
    tokens = torch.randint(config.vocabulary_size, (2, TOKENS + 1), device=device)
    state = torch.randn(2, TOKENS, config.width, device=device) * config.state_sigma
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "initial_state": state.bfloat16(),
    }


def gradients(model: RecurrentModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the mean nats, by parameter; the loss is among them."""
    output = model(depths=DEPTHS, keep_logits=False, **inputs)
    assert output.loss is not None
    output.loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": output.loss.detach(), **{k: v for k, v in found.items() if v is not None}}


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative Frobenius error of each; NaN where anything is not finite."""
    assert found.keys() == exact.keys()
    return {
        key: float((found[key].float() - exact[key].float()).norm() / exact[key].float().norm())
        for key in exact
    }


@torch.no_grad()
def compare_prefix(
    wide: ModelConfig, narrow: ModelConfig, model: RecurrentModel, results: Path
) -> bool:
    """Cosine of the state after a float8 prefix, and the difference of the loss, by its length.

    Whether every one of them is as near to bf16 as it must be.
    """
    device = next(model.parameters()).device
    tokens = torch.randint(wide.vocabulary_size, (1, wide.context + 1), device=device)
    state = torch.randn(1, wide.context, wide.width, device=device) * wide.state_sigma
    inputs = {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "initial_state": state.bfloat16(),
        "keep_logits": False,
    }
    rows = []
    for iterations in PREFIXES:
        outputs = []
        for config in (wide, narrow):
            model.core.config = config
            for block in (*model.prelude, *model.coda):
                block.is_float8 = config.grad_precision is ProductPrecision.fp8
            prefix = model(depths=[Depth(iterations, 0)], **inputs).state
            whole = model(depths=[Depth(iterations, 8)], **inputs).loss
            outputs.append((prefix.float().flatten(0, 1), float(whole)))
        (a, loss_a), (b, loss_b) = outputs
        cosine = F.cosine_similarity(a, b, dim=-1)
        rows.append((iterations, float(cosine.mean()), float(cosine.min()), loss_b - loss_a))
        print(
            f"float8 prefix of {iterations}: cosine of states {rows[-1][1]:.6f} in the mean, "
            f"{rows[-1][2]:.6f} at least; loss {rows[-1][3]:+.2e}",
            flush=True,
        )
    file_name = f"step-float8-{wide.name}-{narrow.grad_precision.value}.csv"
    with (results / file_name).open("w", newline="") as file:
        header = ("no_grad", "cosine_mean", "cosine_min", "loss_difference")
        csv.writer(file).writerows([header, *rows])
    # written so that NaN fails
    is_good = all(least >= LEAST_COSINE and abs(nats) <= MOST_NATS for *_, least, nats in rows)
    if not is_good:
        print(
            f"{wide.name}: FAILS; cosines must be {LEAST_COSINE} at least, differences of the loss "
            f"{MOST_NATS} nats at most",
            flush=True,
        )
    return is_good
