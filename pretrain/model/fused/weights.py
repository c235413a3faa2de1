"""The tensors of one layer, their copies in float8, and how long those are good for."""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain_kernels.fp8 import Fp8
from pretrain_kernels.quantize_both_ways import quantize_both_ways
from pretrain_kernels.quantize_rows import quantize_rows


class LayerWeights(NamedTuple):
    """The tensors of one layer, in the order in which their gradients are returned."""

    norm_1: Tensor
    qkv: Tensor
    qk_bias: Tensor
    output: Tensor
    norm_2: Tensor
    norm_3: Tensor
    gate_up: Tensor
    down: Tensor
    norm_4: Tensor

    @staticmethod
    def of(block: nn.Module) -> "LayerWeights":
        """The parameters of a SandwichBlock, read when needed: ZeRO-3 swaps what is in them."""
        return LayerWeights(*(block.get_parameter(name) for name in PARAMETERS))

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """In the order of `Matrices`."""
        return self.qkv, self.output, self.gate_up, self.down


PARAMETERS = (
    "norm_1.gain",
    "attention.qkv",
    "attention.qk_bias",
    "attention.output",
    "norm_2.gain",
    "norm_3.gain",
    "mlp.gate_up",
    "mlp.down",
    "norm_4.gain",
)


class Matrices(NamedTuple):
    """The four matrices of a layer."""

    qkv: Fp8
    output: Fp8
    gate_up: Fp8
    down: Fp8


class Float8Weights(NamedTuple):
    """A layer's matrices in float8, for products with activations and with their gradients."""

    by_output: Matrices
    """Each as it is, a scale for every output."""
    by_input: Matrices | None
    """Each transposed, a scale for every input; None where nothing is differentiated."""

    @staticmethod
    @torch.no_grad()
    def of(weights: LayerWeights, *, has_gradient: bool) -> "Float8Weights":
        """Quantized now; the weights must not change while this is in use.

        Raises ConfigError on a GPU that knows no float8.
        """
        check_float8(weights.qkv.device)
        if not has_gradient:
            rows = (quantize_rows(matrix) for matrix in weights.matrices)
            return Float8Weights(Matrices(*rows), None)
        both = [quantize_both_ways(matrix) for matrix in weights.matrices]
        by_output, by_input = (Matrices(*copies) for copies in zip(*both, strict=True))
        return Float8Weights(by_output, by_input)


@functools.cache
def check_float8(device: torch.device) -> None:
    """ConfigError if this is a GPU that does not multiply float8_e4m3fn (Ada and Hopper do)."""
    if device.type != "cuda":
        return
    found = torch.cuda.get_device_capability(device)
    if found < (8, 9):
        raise ConfigError(
            f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}, "
            "and only GPUs of 8.9 or more multiply float8: set model.no_grad_precision=same and "
            "model.grad_precision=same."
        )


class _Source(NamedTuple):
    """A matrix as it was when it was quantized."""

    seen: Tensor
    """The same memory; kept, so that no other tensor can be given its address."""
    version: int
    """How often torch had written to it."""

    @staticmethod
    def of(matrix: Tensor) -> "_Source":
        return _Source(matrix.detach(), matrix._version)

    def is_still(self, matrix: Tensor) -> bool:
        return matrix.data_ptr() == self.seen.data_ptr() and matrix._version == self.version


class Float8Copies:
    """A layer's weights in float8: quantized for every pass, or while held for all of them.

    Whoever updates the weights says when they are held, because a kernel or a collective that
    writes to a flat buffer leaves no trace on the parameters that are views of it.
    """

    def __init__(self) -> None:
        self._holders = 0
        self._held: Float8Weights | None = None
        self._sources: list[_Source] = []

    @property
    def is_held(self) -> bool:
        """Whether copies stay from pass to pass."""
        return self._holders > 0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, copies stay; they are dropped at the end of the outermost one."""
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
            if not self.is_held:
                self._held, self._sources = None, []

    def of(self, weights: LayerWeights, *, has_gradient: bool) -> Float8Weights:
        """The copies, transposed ones too if has_gradient; the same ones again while held.

        Raises RuntimeError if torch has written to a matrix since its copy was made, or if it lies
        elsewhere.
        """
        if not self.is_held:
            return Float8Weights.of(weights, has_gradient=has_gradient)
        if self._held is not None:
            self._check(weights)
        if self._held is None or (has_gradient and self._held.by_input is None):
            # gone first: both at once would be memory that nobody has counted
            self._held = None
            self._held = Float8Weights.of(weights, has_gradient=has_gradient)
            self._sources = [_Source.of(matrix) for matrix in weights.matrices]
        return self._held

    def _check(self, weights: LayerWeights) -> None:
        for name, source, matrix in zip(
            Matrices._fields, self._sources, weights.matrices, strict=True
        ):
            if not source.is_still(matrix):
                raise RuntimeError(
                    f"the layer's matrix {name} was written to, or moved, while its float8 copy is "
                    f"held (writes: {source.version} when it was quantized, {matrix._version} "
                    "now). Leave fixed_weights before weights change, and enter it again."
                )
