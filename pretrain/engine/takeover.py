"""ZeRO-1 and 2 in bf16 with our update in the place of DeepSpeed's, and fewer passes before it.

DeepSpeed's own sequence costs these passes besides the optimizer's (bytes per parameter):

    zero the sums twice 8, widen a bf16 gradient 6, add it 12, each tensor's norm 4,
    clip 8, round the weights 6; ZeRO-2 also looks for inf 8

Here a step's first gradient starts its sum (6), norms are one pass (4), and the optimizer clips and
rounds on its way (2). Sums over ranks are ours where they overlap with the backward pass and under
ZeRO-2 (`reduction`). Hooks, other sums and the gathering of weights stay DeepSpeed's. ZeRO-3 and
fp32 runs keep its whole sequence: there partitions are updated in pieces.

The classes below override methods of DeepSpeed 0.19.8 that they know; with any other version
`take_over` does nothing but say so. This module imports deepspeed, so it is imported when an engine
is built.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import __version__ as deepspeed_version
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from pretrain.engine.config import EngineConfig
from pretrain.engine.reduction import EarlySums, OwnedShard, ShardedSums, SideStream
from pretrain.engine.update import Update
from pretrain.optim.adamw import AdamW
from pretrain.optim.ellis_adam import EllisAdam
from pretrain.optim.slices import Layout
from pretrain_kernels.add_gradient import add_gradient

log = logging.getLogger(__name__)

KNOWN_VERSION = "0.19.8"


class Zero1(BF16_Optimizer):
    """What DeepSpeed makes of ZeRO-1 with bf16 weights and fp32 sums of gradients."""

    update: Update
    early: EarlySums | None
    """None: all sums are reduced after the last backward pass, by DeepSpeed."""
    before_waiting: Callable[[], None]
    """Called when a step's passes have ended and this rank begins to wait for the others' sums."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update, gather the weights of all ranks, and forget the gradient."""
        assert closure is None
        self._global_grad_norm = self.update(self.fp32_groups_gradient_flat_partition)
        self.overflow = self._global_grad_norm == torch.inf
        if self.update.is_applied:
            self._lazy_init_hp_params_optimizer_state()
            gather(self, self.bf16_groups_flat, self.bf16_partitioned_groups)
        self.clear_hp_grads()

    @torch.no_grad()
    def _update_hp_grad(
        self, lp: torch.nn.Parameter, group_idx: int, param_idx: int, clear_lp_grads: bool
    ) -> None:
        """Of a parameter's hook: its gradient begins or joins the step's sum."""
        assert not clear_lp_grads
        if lp.grad is None:
            return
        total = self.fp32_groups_gradients[group_idx][param_idx]
        has_gradient = self.fp32_groups_has_gradients[group_idx]
        add_gradient(total, lp.grad.reshape(-1), is_first=not has_gradient[param_idx])
        lp._hp_grad = total  # type: ignore[attr-defined]
        has_gradient[param_idx] = True
        if self.early is not None and self.is_gradient_accumulation_boundary():
            self.early.finished(total)

    @torch.no_grad()
    def get_grads_for_reduction(self) -> Any:
        """Of the reduction over ranks: sums that no gradient has begun are zero."""
        self.before_waiting()
        for totals, has_gradient in zip(
            self.fp32_groups_gradients, self.fp32_groups_has_gradients, strict=True
        ):
            for total, has in zip(totals, has_gradient, strict=True):
                if not has:
                    total.zero_()
        if self.early is None:
            return super().get_grads_for_reduction()
        return self.early.left([t for totals in self.fp32_groups_gradients for t in totals]), {}

    def clear_hp_grads(self) -> None:
        """Forget the sums: the next gradients overwrite them, and padding is zero for good."""
        for has_gradient in self.fp32_groups_has_gradients:
            has_gradient[:] = [False] * len(has_gradient)


class Zero2(DeepSpeedZeroOptimizer):
    """What DeepSpeed makes of ZeRO-2 with bf16 weights and fp32 sums of gradients."""

    update: Update
    sums: ShardedSums

    @torch.no_grad()
    def process_gradients(self, param: nn.Parameter, i: int) -> None:
        """Of a parameter's hook: its gradient, of group i, goes to the ranks that update it."""
        assert param.grad is not None
        self.sums.add(param, param.grad)
        param.grad = None

    @torch.no_grad()
    def independent_gradient_partition_epilogue(self) -> None:
        """Of the end of a backward pass."""
        self.sums.flush()
        self._epilogue_ran_this_backward = True

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update, gather the weights of all ranks, and forget the gradient."""
        assert closure is None
        self._global_grad_norm = self.update(self.sums.take())
        self.overflow = self._global_grad_norm == torch.inf
        self.sums.forget()
        if self.update.is_applied:
            self._lazy_init_hp_params_optimizer_state()
            gather(self, self.bit16_groups_flat, self.parallel_partitioned_bit16_groups)


def take_over(
    zero: Any, optimizer: EllisAdam | AdamW, layout: Layout, config: EngineConfig,
    *, rank: int, clip: float, before_waiting: Callable[[], None],
) -> Update | None:  # fmt: skip
    """Give `zero`, which DeepSpeed made, our step; None where DeepSpeed's own stays.

    `before_waiting`: Zero1's.
    """
    if type(zero) is BF16_Optimizer and zero.immediate_grad_update:
        taken, partitions = Zero1, zero.bf16_partitioned_groups
    elif type(zero) is DeepSpeedZeroOptimizer and zero.dtype == torch.bfloat16:
        taken, partitions = Zero2, zero.parallel_partitioned_bit16_groups
    else:
        return None
    if deepspeed_version != KNOWN_VERSION:
        log.warning(
            "DeepSpeed %s takes its own optimizer step, which costs some 3 %% at one micro-step:"
            " only %s is known to the faster one (pip install deepspeed==%s)",
            deepspeed_version, KNOWN_VERSION, KNOWN_VERSION,
        )  # fmt: skip
        if config.overlap_comm:
            log.warning("engine.overlap_comm=true does nothing in that step: only ours overlaps")
        return None
    rounded = [partition[rank] for partition in partitions]
    zero.update = Update(optimizer, layout, rounded, clip=clip)
    side = SideStream(rounded[0].device, overlaps=config.overlap_comm)
    if taken is Zero1:
        group = zero.real_dp_process_group[0]
        has_others = config.overlap_comm and dist.get_world_size(group) > 1
        zero.early = EarlySums(side, group) if has_others else None
        zero.before_waiting = before_waiting
    else:
        zero.sums = sharded_sums(zero, layout, side, config.bucket_elements)
    # The object has hooks on every parameter by now; its class is what they look methods up in.
    zero.__class__ = taken
    return zero.update


def sharded_sums(zero: Any, layout: Layout, side: SideStream, bucket_elements: int) -> ShardedSums:
    """For the parameters of DeepSpeed's groups, which are those of the layout's partitions."""
    totals = [torch.zeros_like(partition.flat) for partition in layout.partitions]
    shards = {
        parameters[fragment.tensor]: OwnedShard(total, fragment)
        for parameters, partition, total in zip(
            zero.bit16_groups, layout.partitions, totals, strict=True
        )
        for fragment in partition.fragments
    }
    elements = sum(p.numel() for parameters in zero.bit16_groups for p in parameters)
    return ShardedSums(
        totals, shards, side,
        bucket_elements=min(bucket_elements, elements), group=zero.real_dp_process_group[0],
    )  # fmt: skip


def gather(zero: Any, flats: list[Tensor], partitions: list[list[Tensor]]) -> None:
    """Every rank's working weights, from each rank's own."""
    all_gather_dp_groups(
        groups_flat=flats,
        partitioned_param_groups=partitions,
        dp_process_group=zero.real_dp_process_group,
        start_alignment_factor=zero.nccl_start_alignment_factor,
        allgather_bucket_size=zero.allgather_bucket_size,
    )
