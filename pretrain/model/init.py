"""How weights begin: the "takase" initialisation of Huginn.

Each tensor's numbers depend on (seed, its name) alone, so neither the order of tensors nor the
device changes them. Source: arXiv 2502.05171 and its training code (both halves of the MLP's
first matrix share one sigma; the published Hugging Face file differs there). The first failed
run's initialisation is called "scaled"; we read that as these sigmas with the embedding unscaled,
which is `model.embedding_scale=false`: no account of other sigmas was found.
"""

import math

import torch
from torch import Tensor

from pretrain.model.keyed import make_key, truncated_normals
from pretrain.model.recurrent import RecurrentModel

# Elements drawn at once: bounds the temporaries to about 0.1 GiB.
_CHUNK_ELEMENTS = 1 << 22
# Norm gains and q/k biases.
_CONSTANTS = {"gain": 1.0, "qk_bias": 0.0}


@torch.no_grad()
def initialize(model: RecurrentModel, *, mean_depth: int, seed: int) -> None:
    """Fill every parameter in place, on its device and in its dtype.

    `mean_depth` counts the core's layers in the effective number of layers that shrinks the
    projections back into the residual stream (2 + 2 + 4 x 32 = 132 for Huginn).
    """
    for name, parameter in model.named_parameters():
        flat_N = parameter.view(-1)
        for start in range(0, flat_N.numel(), _CHUNK_ELEMENTS):
            stop = min(start + _CHUNK_ELEMENTS, flat_N.numel())
            flat_N[start:stop] = initial_values(
                model,
                name,
                range(start, stop),
                mean_depth=mean_depth,
                seed=seed,
                device=parameter.device,
            )


def initial_values(
    model: RecurrentModel,
    name: str,
    elements: range,
    *,
    mean_depth: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """How consecutive elements of one flattened parameter begin, float32.

    The model itself may be on the meta device: any slice of any size of model can be looked at.
    """
    kind = name.rsplit(".", 1)[-1]
    if kind in _CONSTANTS:
        return torch.full((len(elements),), _CONSTANTS[kind], device=device)
    counters_N = torch.arange(elements.start, elements.stop, dtype=torch.int32, device=device)
    draws_N = truncated_normals(make_key("weights", seed, name), counters_N)
    return draws_N.mul_(_sigma(model, kind, mean_depth)).float()


def _sigma(model: RecurrentModel, kind: str, mean_depth: int) -> float:
    config = model.config
    base = math.sqrt(2.0 / (5.0 * config.width))
    if kind in ("output", "down"):
        layers = config.prelude_layers + config.coda_layers + config.core_layers * mean_depth
        return base / math.sqrt(2.0 * layers)
    assert kind in ("weight", "qkv", "gate_up", "adapter"), kind
    return base
