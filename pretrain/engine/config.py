"""How the model is run on devices, and how it is saved. Torch-free."""

import re
from dataclasses import dataclass, field
from enum import Enum

from pretrain.errors import ConfigError

_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Precision(Enum):
    """bf16: bf16 weights with fp32 master copies and gradients; fp32: all fp32."""

    bf16 = "bf16"
    fp32 = "fp32"


class Device(Enum):
    """Where to train; auto: CUDA if there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """DeepSpeed ZeRO and the numerics of a step."""

    zero_stage: int
    """1: shard the optimizer; 2: gradients too; 3: weights too."""
    precision: Precision
    """Storage and arithmetic of weights and activations; masters and moments are fp32."""
    device: Device = Device.auto
    """Where to train."""
    checkpoint_activations: bool = False
    """Recompute iterations of the core in the backward pass instead of keeping them."""
    kept_iterations: int = 0
    """With checkpoint_activations, the last so many iterations of a row are kept all the same."""
    bucket_elements: int = 200_000_000
    """Elements of one gradient bucket."""
    zero3_persistent_elements: int = 100_000
    """Under ZeRO-3, tensors of at most this many elements stay whole on every rank."""
    overlap_comm: bool = False
    """Sum gradients over ranks while the backward pass runs that makes them: under ZeRO-1 and 2 in
    bf16 by our own reduction, elsewhere by DeepSpeed's, which `doctor` tests. Of our sums ZeRO-2's
    are the same bits as without; ZeRO-1's travel in other pieces, which more than two ranks add in
    another order."""
    deterministic: bool = False
    """Only deterministic kernels on the GPU; the CPU is always deterministic."""
    timeout_s: int = 1800
    """A collective that waits longer than this ends the process."""

    def __post_init__(self) -> None:
        if self.zero_stage not in (1, 2, 3):
            raise ConfigError(f"engine.zero_stage={self.zero_stage} must be 1, 2 or 3.")
        if (self.kept_iterations and not self.checkpoint_activations) or self.kept_iterations < 0:
            raise ConfigError(
                f"engine.kept_iterations={self.kept_iterations} must be 0 or more, and all are "
                "kept without engine.checkpoint_activations=true."
            )
        for name in ("bucket_elements", "timeout_s"):
            if getattr(self, name) < 1:
                raise ConfigError(f"engine.{name}={getattr(self, name)} must be at least 1.")
        if self.zero3_persistent_elements < 0:
            raise ConfigError(
                f"engine.zero3_persistent_elements={self.zero3_persistent_elements} must be 0 or "
                "more."
            )

    def keeps_float8(self, *, micro_steps: int) -> bool:
        """Whether float8 copies of weights stay from one micro-step to the next.

        With a single one there is no next, and copies for iterations without gradient would only
        lie there during the backward pass. Under ZeRO-3 every pass gathers weights anew, and whole
        copies on every rank would undo the sharding.
        """
        return micro_steps > 1 and self.zero_stage < 3

    @property
    def reduces_itself(self) -> bool:
        """Whether sums over ranks are pretrain/engine/reduction.py's and not DeepSpeed's."""
        return self.zero_stage < 3 and self.precision is Precision.bf16

    @property
    def model_kept_iterations(self) -> int | None:
        """What the model is told: None where nothing is recomputed."""
        return self.kept_iterations if self.checkpoint_activations else None


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every_steps: int
    """Save after every so many steps; the last step is always saved."""
    keep_last: int = 2
    """Whole checkpoints to keep, newest first."""
    keep_every_steps: int = 0
    """Also keep for good each checkpoint whose step is a multiple; 0: none."""
    tags: dict[str, int] = field(default_factory=dict)
    """Steps by name (+checkpoint.tags.NAME=STEP): saved, and kept until the file
    checkpoints/tags/NAME is removed."""
    asynchronous: bool = True
    """Copy to host memory and write beside training; otherwise training waits."""

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ConfigError(f"checkpoint.every_steps={self.every_steps} must be at least 1.")
        if self.keep_last < 1:
            raise ConfigError(f"checkpoint.keep_last={self.keep_last} must be at least 1.")
        if self.keep_every_steps < 0:
            raise ConfigError(
                f"checkpoint.keep_every_steps={self.keep_every_steps} must be 0 or more."
            )
        for tag, step in self.tags.items():
            if not _TAG.fullmatch(tag) or step < 1:
                raise ConfigError(
                    f"checkpoint.tags.{tag}={step}: a tag is letters, digits, '-', '_' and '.', "
                    "and names a step of at least 1."
                )
