"""AdamW, as torch has it, with updates that can be dropped."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class AdamW(torch.optim.AdamW):
    """torch's AdamW; while `is_held`, a step changes nothing, moments included."""

    is_held = False

    def step(self, closure: Any = None) -> Any:
        """Update, unless held."""
        return None if self.is_held else super().step(closure)

    @torch.no_grad()
    def update(self, factor: float = 1.0, rounded: Mapping[Tensor, Tensor] | None = None) -> None:
        """As `EllisAdam.update`, but torch's kernel needs a pass for each of the two."""
        if self.is_held:
            return
        if factor != 1.0:
            gradients = [p.grad for group in self.param_groups for p in group["params"]]
            torch._foreach_mul_([g for g in gradients if g is not None], factor)
        self.step()
        for weight, target in (rounded or {}).items():
            target.copy_(weight)
