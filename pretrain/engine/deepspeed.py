"""The model on its devices: DeepSpeed ZeRO behind forward, backward and step.

It imports deepspeed, and `takeover`, which does, when an engine is built: DeepSpeed picks its
accelerator at import from a variable that `world.join` sets.
"""

import contextlib
import datetime
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.config import TrainConfig
from pretrain.engine.config import EngineConfig, Precision
from pretrain.engine.ds_config import build_deepspeed_config
from pretrain.engine.partitions import check_complete, find_partitions, refresh_weights
from pretrain.engine.update import Update
from pretrain.engine.world import World
from pretrain.errors import CheckpointError
from pretrain.model.block import SandwichBlock
from pretrain.model.config import ComputePath
from pretrain.model.fixed import fixed_weights, has_fixed_weights
from pretrain.model.recurrent import Output, RecurrentCore, RecurrentModel
from pretrain.optim.build import build_optimizer
from pretrain.optim.part_norms import PartNorms
from pretrain.optim.slices import Layout, TensorInfo

log = logging.getLogger(__name__)


class StepResult(NamedTuple):
    """What an optimizer step did."""

    grad_norm: float
    """Global L2 norm of the gradient before clipping; inf if it was not finite."""
    is_applied: bool
    """False if the update was dropped: nothing has changed on any rank."""
    part_norms: dict[str, float]
    """gradient/norm_PART before clipping, if asked for and finite."""


def _nothing() -> None:
    """Nobody asked."""


class Engine:
    """A model under ZeRO: shards, gradient sums, master weights and the optimizer.

    `layout` tells which fp32 pieces this rank owns; checkpoints read and write through it.
    """

    def __init__(
        self, model: RecurrentModel, config: TrainConfig, world: World, *, micro_steps: int
    ) -> None:
        """Take over an initialised fp32 model; each step has `micro_steps` backward passes."""
        self.world = world
        self.micro_steps = micro_steps
        self.zero_stage = config.engine.zero_stage
        self._keeps_float8 = config.engine.keeps_float8(micro_steps=micro_steps)
        self.optimizer_steps = 0
        self._micro_step = 0
        # Before DeepSpeed rounds the weights to bf16; no copy, rounding allocates anew.
        initial = {name: p.detach() for name, p in model.named_parameters()}
        assert all(weight.dtype == torch.float32 for weight in initial.values())
        self.tensors = [TensorInfo(n, tuple(w.shape)) for n, w in initial.items()]
        names = {parameter: name for name, parameter in model.named_parameters()}
        model.kept_iterations = config.engine.model_kept_iterations
        self.optimizer = build_optimizer(model.named_parameters(), config.optimizer)
        self._engine = self._start_deepspeed(model, config)
        self.module: RecurrentModel = self._engine.module
        partitions = find_partitions(self._engine.optimizer, names, rank=world.rank)
        self.layout = Layout(partitions, dist.all_reduce)
        self.optimizer.layout = self.layout
        self._part_norms = PartNorms(self.optimizer, self.layout)
        self._gradient_clip = config.optimizer.gradient_clip
        self.before_waiting: Callable[[], None] = _nothing
        """Under ZeRO-1 in bf16 called at the end of a step's last backward pass, before this rank
        waits in it for the others."""
        self._update = self._take_over(config.engine)
        self._check(names)
        if config.engine.precision is Precision.bf16:
            self._set_masters(initial)

    def __call__(self, *args: Any, **kwargs: Any) -> Output:
        """The model's forward pass."""
        output: Output = self._engine(*args, **kwargs)
        return output

    def accumulation(self) -> contextlib.AbstractContextManager[None]:
        """Around the passes of one step and not its update: weights do not change inside.

        So float8 copies of weights are made once a step, where that is worth their memory.
        """
        return fixed_weights(self.module) if self._keeps_float8 else contextlib.nullcontext()

    def backward(self, nats: Tensor, *, scale: float) -> None:
        """Add d(scale x nats)/d(weights) to the gradient: a plain sum over ranks and micro-steps.

        A non-finite `nats` makes the whole gradient NaN, so that `step` skips on every rank.
        """
        assert self._micro_step < self.micro_steps, "more backward passes than micro_steps"
        # ZeRO-3 can only average over ranks. Zero times a non-finite number is NaN.
        ranks = self.world.size if self.zero_stage == 3 else 1
        factor = scale * ranks + 0.0 * nats.detach()
        self._engine.backward(nats * factor, scale_wrt_gas=False)
        self._micro_step += 1
        if self._micro_step < self.micro_steps:
            # Only counts: DeepSpeed wants to hear of every micro-step.
            self._engine.step()

    def step(
        self, learning_rate: float, *, drops_update: bool = False, measures_parts: bool = False
    ) -> StepResult:
        """Clip and apply the gradient, or drop it everywhere if it is not finite.

        `drops_update`, equal on all ranks, drops it in any case. `measures_parts`, equal too, adds
        nothing where the update is ours, else one pass over this rank's share of the gradient
        (none with AdamW, whose update sums the squares on its way) and a sum of five numbers.
        """
        assert self._micro_step == self.micro_steps, "step before the last backward pass"
        assert not has_fixed_weights(self.module), "step inside of accumulation or evaluation"
        self._micro_step = 0
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.is_held = drops_update
        if measures_parts and self._update is None:
            self._part_norms.begin()
        self._engine.step()
        self.optimizer.is_held = False
        is_applied = bool(self._engine.was_step_applied()) and not drops_update
        self.optimizer_steps += is_applied
        norm = float(self._engine.get_global_grad_norm())
        return StepResult(norm, is_applied, self._measured_parts(norm) if measures_parts else {})

    def _measured_parts(self, norm: float) -> dict[str, float]:
        if self._update is not None:
            return self._update.part_norms()
        # DeepSpeed gives the optimizer the gradient after clipping.
        clip = self._gradient_clip
        by = max(norm / clip, 1.0) if clip else 1.0
        return {name: value * by for name, value in self._part_norms.take().items()}

    def _take_over(self, config: EngineConfig) -> Update | None:
        from pretrain.engine.takeover import take_over

        return take_over(
            self._engine.optimizer, self.optimizer, self.layout, config,
            rank=self.world.rank, clip=self._gradient_clip,
            before_waiting=lambda: self.before_waiting(),
        )  # fmt: skip

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[RecurrentModel]:
        """The model in evaluation mode without gradients; under ZeRO-3 call it on all ranks.

        Weights do not change inside, and float8 copies of them are made once, but under ZeRO-3.
        """
        is_whole = self.zero_stage < 3
        fixed = fixed_weights(self.module) if is_whole else contextlib.nullcontext()
        self.module.eval()
        try:
            with torch.no_grad(), fixed:
                yield self.module
        finally:
            self.module.train()

    def refresh(self) -> None:
        """Round the master weights into the working weights, and prove that all ranks agree.

        Raises CheckpointError if the ranks hold different weights afterwards.
        """
        assert not has_fixed_weights(self.module), "weights change inside of fixed_weights"
        refresh_weights(self._engine.optimizer)
        sums = torch.stack(
            [
                _bits(parameter).sum(dtype=torch.int64)
                for parameter in self.module.parameters()
                if parameter.numel() == _full_numel(parameter)
            ]
            or [torch.zeros((), dtype=torch.int64, device=self.world.device)]
        )
        if not self.world.agree(sums.tolist()):
            raise CheckpointError("The ranks hold different weights after loading; do not train.")

    def moments(self, flat: Tensor) -> dict[str, Tensor]:
        """The optimizer's fp32 moments of a partition by name; empty before the first update."""
        state = self.optimizer.state.get(flat, {})
        return {key: value for key, value in state.items() if value.shape == flat.shape}

    def set_moments(self, flat: Tensor, moments: dict[str, Tensor], *, steps: int) -> None:
        """Replace the optimizer's state of a partition, as after `steps` updates."""
        if not moments:
            self.optimizer.state.pop(flat, None)
            return
        step = torch.tensor(float(steps), dtype=torch.float32)
        self.optimizer.state[flat] = {"step": step, **moments}

    def _start_deepspeed(self, model: RecurrentModel, config: TrainConfig) -> Any:
        import deepspeed
        import deepspeed.ops
        from deepspeed.utils import groups, set_z3_leaf_modules

        _quieten()
        accelerator = deepspeed.accelerator.get_accelerator()
        assert accelerator.device_name() == self.world.device.type, (
            f"deepspeed was imported for {accelerator.device_name()} before world.join chose "
            f"{self.world.device.type}"
        )
        if self.world.device.type == "cpu":
            # Otherwise it compiles a shared-memory collective with g++ for a minute, and a
            # process killed meanwhile leaves a lock that hangs every later run.
            deepspeed.ops.__compatible_ops__ = {}
        timeout = datetime.timedelta(seconds=config.engine.timeout_s)
        deepspeed.init_distributed(dist_init_required=False, timeout=timeout)
        if groups._WORLD_GROUP is None:
            # DeepSpeed clones the world without a timeout of ours.
            groups._WORLD_GROUP = dist.new_group(range(self.world.size), timeout=timeout)
        if self.zero_stage == 3:
            # The loop over iterations is one module call: ranks may differ in depth. A fused layer
            # reads the weights of its parts without calling them, so it is gathered whole.
            is_fused = config.model.path is ComputePath.fused
            leaves = [RecurrentCore, *([SandwichBlock] if is_fused else [])]
            set_z3_leaf_modules(model, leaves)
        # It prints memory reports.
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            engine, _, _, _ = deepspeed.initialize(
                model=model,
                optimizer=self.optimizer,
                config=build_deepspeed_config(config, micro_steps=self.micro_steps),
            )
        log.debug("deepspeed.initialize printed: %s", printed.getvalue())
        return engine

    def _check(self, names: dict[Any, str]) -> None:
        """Assert that DeepSpeed does what it was asked to."""
        engine = self._engine
        assert engine.gradient_accumulation_steps() == self.micro_steps
        assert engine.basic_optimizer is self.optimizer
        assert {name for name, _ in self.module.named_parameters()} == set(names.values())
        assert all(p.flat.dtype == torch.float32 for p in self.layout.partitions)
        own = [
            (partition.tensors[f.tensor].name, f.tensor_start, f.numel)
            for partition in self.layout.partitions
            for f in partition.fragments
        ]
        everyone = [piece for pieces in self.world.gather_objects(own) for piece in pieces]
        check_complete(everyone, {tensor.name: tensor.numel for tensor in self.tensors})

    @torch.no_grad()
    def _set_masters(self, initial: dict[str, Tensor]) -> None:
        """Start from fp32 weights, where DeepSpeed starts from weights rounded to bf16."""
        for partition in self.layout.partitions:
            for fragment in partition.fragments:
                weight = initial[partition.tensors[fragment.tensor].name].view(-1)
                source = weight.narrow(0, fragment.tensor_start, fragment.numel)
                partition.piece(fragment).copy_(source)


def _quieten() -> None:
    """Send DeepSpeed's log through ours, less what is known and harmless."""
    logger = logging.getLogger("DeepSpeed")
    logger.handlers.clear()
    logger.propagate = True
    logger.addFilter(_is_news)
    # torch 2.13 renames two collectives that DeepSpeed calls on every step.
    warnings.filterwarnings("ignore", message=".torch.distributed.* is deprecated")


def _is_news(record: logging.LogRecord) -> bool:
    # Said of every optimizer but its own; ours is tested against an unsharded oracle.
    return "untested optimizer" not in record.getMessage()


def _bits(parameter: Tensor) -> Tensor:
    return parameter.detach().view({2: torch.int16, 4: torch.int32}[parameter.element_size()])


def _full_numel(parameter: Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
