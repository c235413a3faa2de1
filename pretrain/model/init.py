"""How weights begin: the "takase" initialisation of Huginn.

Each tensor's numbers depend on (seed, its name) alone, so neither the order of tensors nor the
device changes them. Source: arXiv 2502.05171 and its training code (both halves of the MLP's
first matrix share one sigma; the published Hugging Face file differs there).
"""

import math

import torch
from torch import Tensor

from pretrain.model.keyed import make_key, truncated_normals
from pretrain.model.recurrent import RecurrentModel

# Elements drawn at once: bounds the temporaries to about 0.1 GiB.
_CHUNK_ELEMENTS = 1 << 22


@torch.no_grad()
def initialize(model: RecurrentModel, *, mean_depth: int, seed: int) -> None:
    """Fill every parameter in place, on its device and in its dtype.

    `mean_depth` counts the core's layers in the effective number of layers that shrinks the
    projections back into the residual stream (2 + 2 + 4 x 32 = 132 for Huginn).
    """
    for name, parameter in model.named_parameters():
        kind = name.rsplit(".", 1)[-1]
        if kind == "gain":
            parameter.fill_(1.0)
        elif kind == "qk_bias":
            parameter.zero_()
        else:
            sigma = _sigma(model, kind, mean_depth)
            _fill(parameter, sigma, name=name, seed=seed)


def _sigma(model: RecurrentModel, kind: str, mean_depth: int) -> float:
    config = model.config
    base = math.sqrt(2.0 / (5.0 * config.width))
    if kind in ("output", "down"):
        layers = config.prelude_layers + config.coda_layers + config.core_layers * mean_depth
        return base / math.sqrt(2.0 * layers)
    assert kind in ("weight", "qkv", "gate_up", "adapter"), kind
    return base


def _fill(parameter: Tensor, sigma: float, *, name: str, seed: int) -> None:
    key = make_key("weights", seed, name)
    flat_N = parameter.view(-1)
    for start in range(0, flat_N.numel(), _CHUNK_ELEMENTS):
        stop = min(start + _CHUNK_ELEMENTS, flat_N.numel())
        counters_N = torch.arange(start, stop, dtype=torch.int32, device=parameter.device)
        flat_N[start:stop] = truncated_normals(key, counters_N).mul_(sigma).float()
