"""ELLISAdam, the published run's optimizer, on whole tensors or on ZeRO's flat partitions."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pretrain.optim.slices import Layout, Partition, SpanTables, in_line, unsharded
from pretrain_kernels.ellis_adam import update_moments, update_weights


class EllisAdam(Optimizer):
    """Adam with arctangent updates whose size is clipped per tensor, and decay per step.

    While `is_held`, a step changes nothing.

    For each tensor at its t-th update (arXiv 2502.05171, appendix, and its code):

        m, v <- g, g^2                                   only at t = 1, with running_init
        m    <- m + (1 - beta1) (g - m)
        v    <- max(beta2 v + (1 - beta2) g^2, floor^2)
        eta  =  lr / max(1, rms(g / sqrt(v))) / (1 - beta1^t)
        p    <- p (1 - lr / peak * weight_decay) - eta atan2(m, sqrt(v) / sqrt(1 - beta2^t))

    The rms runs over the whole tensor, so under ZeRO `layout` must be set before the first step;
    one all-reduce of a small fp64 vector per call then makes every sharding give the same rms.
    Both passes over a partition run as kernels where it is float32 on a GPU, else as PyTorch.
    `lr` is set on the groups before each step; `peak` stays what the constructor was given.
    State per partition: `step` (fp32 scalar on the CPU), `exp_avg`, `exp_avg_sq`.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        weight_decay: float,
        beta1: float = 0.9,
        beta2: float = 0.95,
        floor: float = 1e-6,
        update_clipping: bool = True,
        running_init: bool = True,
    ) -> None:
        """`lr` is the peak rate; groups may carry a `weight_decay` of their own."""
        defaults = {
            "lr": lr,
            "peak": lr,
            "weight_decay": weight_decay,
            "beta1": beta1,
            "beta2": beta2,
            "floor": floor,
        }
        super().__init__(params, defaults)
        self.update_clipping = update_clipping
        self.running_init = running_init
        self.layout: Layout | None = None
        self.is_held = False
        # Divisors of the rate of each tensor of a partition at its last update.
        self.clips: dict[Tensor, Tensor] = {}
        self._spans = SpanTables()
        # This rank's sums of g^2 / v of each tensor of a partition at its last update, fp64.
        self._ratios: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every partition that has a gradient. All ranks call it with the same groups."""
        assert closure is None, "EllisAdam evaluates no closure"
        self.update()

    @torch.no_grad()
    def update(self, factor: float = 1.0, rounded: Mapping[Tensor, Tensor] | None = None) -> None:
        """A step whose gradients are `factor` times those of the partitions.

        `rounded` has, for partitions of its choice, a tensor of the same length that gets the new
        weights in its own dtype. Both cost no pass of their own.
        """
        if self.is_held:
            return
        pairs = [(group, p) for group in self.param_groups for p in group["params"]]
        pairs = [(group, p) for group, p in pairs if p.grad is not None]
        if not pairs:
            return
        layout = self.layout or unsharded([p for _, p in pairs])
        work = [(group, layout.partition_of(p)) for group, p in pairs]
        for group, partition in work:
            self._update_moments(group, partition, factor)
        clips = self._clips(work, layout)
        for (group, partition), clip in zip(work, clips, strict=True):
            self._update_weights(group, partition, clip, (rounded or {}).get(partition.flat))
            self.clips[partition.flat] = clip

    def _update_moments(
        self, group: dict[str, Any], partition: Partition, factor: float = 1.0
    ) -> None:
        flat = partition.flat
        state = self.state[flat]
        is_first = not state
        if is_first:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(flat)
            state["exp_avg_sq"] = torch.zeros_like(flat)
        state["step"] += 1
        assert flat.grad is not None
        self._ratios[flat] = update_moments(
            in_line(flat.grad),
            in_line(state["exp_avg"]),
            in_line(state["exp_avg_sq"]),
            self._spans.of(partition),
            beta1=group["beta1"],
            beta2=group["beta2"],
            floor=group["floor"],
            is_start=is_first and self.running_init,
            factor=factor,
        )

    def _clips(self, work: list[tuple[dict[str, Any], Partition]], layout: Layout) -> list[Tensor]:
        """One fp64 divisor per tensor, for each partition: max(1, rms(g / sqrt(v)))."""
        counts = [len(partition.tensors) for _, partition in work]
        device = work[0][1].flat.device
        if not self.update_clipping:
            ones = torch.ones(sum(counts), dtype=torch.float64, device=device)
            return list(torch.split(ones, counts))
        sums = torch.cat([self._ratios[partition.flat] for _, partition in work])
        layout.reduce(sums)
        numels = [tensor.numel for _, partition in work for tensor in partition.tensors]
        mean = sums / torch.tensor(numels, dtype=torch.float64, device=device)
        return list(torch.split(mean.sqrt().clamp(min=1.0), counts))

    def _update_weights(
        self,
        group: dict[str, Any],
        partition: Partition,
        clip: Tensor,
        rounded: Tensor | None = None,
    ) -> None:
        state = self.state[partition.flat]
        updates = float(state["step"])
        rate = group["lr"] / (1 - group["beta1"] ** updates)
        etas = (rate / clip).to(torch.float32)
        keep = 1 - group["lr"] / group["peak"] * group["weight_decay"]
        correction = (1 - group["beta2"] ** updates) ** -0.5
        update_weights(
            in_line(partition.flat),
            in_line(state["exp_avg"]),
            in_line(state["exp_avg_sq"]),
            etas,
            self._spans.of(partition),
            keep=keep,
            correction=correction,
            rounded=rounded,
        )
