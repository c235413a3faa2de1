"""AdamW on whole tensors or on ZeRO's flat partitions, one pass over memory an update."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pretrain.optim.slices import Layout, Partition, SpanTables, in_line, unsharded
from pretrain_kernels.adamw import adamw_


class AdamW(Optimizer):
    """The rule of torch.optim.AdamW (arXiv 1711.05101), and each tensor's sum of gradient^2.

    While `is_held`, a step changes nothing. The rule is elementwise, so `layout` changes no
    weight: it says which tensors lie in a partition, where padding is never touched. An update
    runs as one kernel where a partition is float32 on a GPU, else as PyTorch. State per partition:
    `step` (fp32 scalar on the CPU), `exp_avg`, `exp_avg_sq`.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        weight_decay: float,
        beta1: float = 0.9,
        beta2: float = 0.95,
        epsilon: float = 1e-8,
    ) -> None:
        """`lr` is set on the groups before each step; they may have a `weight_decay` each."""
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "beta1": beta1,
            "beta2": beta2,
            "epsilon": epsilon,
        }
        super().__init__(params, defaults)
        self.layout: Layout | None = None
        self.is_held = False
        # This rank's sums of gradient^2 of each tensor of a partition at its last update, fp64.
        self.squares: dict[Tensor, Tensor] = {}
        self._spans = SpanTables()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every partition that has a gradient."""
        assert closure is None, "AdamW evaluates no closure"
        self.update()

    @torch.no_grad()
    def update(self, factor: float = 1.0, rounded: Mapping[Tensor, Tensor] | None = None) -> None:
        """As `EllisAdam.update`: gradients times `factor`, new weights into `rounded` too."""
        if self.is_held:
            return
        pairs = [(group, p) for group in self.param_groups for p in group["params"]]
        pairs = [(group, p) for group, p in pairs if p.grad is not None]
        layout = self.layout or unsharded([p for _, p in pairs])
        for group, flat in pairs:
            self.squares[flat] = self._update(
                group, layout.partition_of(flat), factor, (rounded or {}).get(flat)
            )

    def _update(
        self, group: dict[str, Any], partition: Partition, factor: float, rounded: Tensor | None
    ) -> Tensor:
        flat = partition.flat
        state = self.state[flat]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(flat)
            state["exp_avg_sq"] = torch.zeros_like(flat)
        state["step"] += 1
        assert flat.grad is not None
        return adamw_(
            in_line(flat),
            in_line(flat.grad),
            in_line(state["exp_avg"]),
            in_line(state["exp_avg_sq"]),
            self._spans.of(partition),
            rate=group["lr"],
            beta1=group["beta1"],
            beta2=group["beta2"],
            epsilon=group["epsilon"],
            weight_decay=group["weight_decay"],
            step=int(state["step"]),
            factor=factor,
            rounded=rounded,
        )
