"""AdamW, as torch has it, with updates that can be dropped."""

from typing import Any

import torch


class AdamW(torch.optim.AdamW):
    """torch's AdamW; while `is_held`, a step changes nothing, moments included."""

    is_held = False

    def step(self, closure: Any = None) -> Any:
        """Update, unless held."""
        return None if self.is_held else super().step(closure)
