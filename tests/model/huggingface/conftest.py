"""A folder of the published format, and how to spoil it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

SOURCE = Path(__file__).parents[2] / "golden" / "b_2_4_2_d48"


class Folder:
    """A copy of a published folder that a test may change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.weights = path / "model.safetensors"
        self.index = path / "model.safetensors.index.json"
        for name in ("config.json", "model.safetensors"):
            shutil.copy(SOURCE / name, path / name)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.weights)

    def rewrite(self, **changes: torch.Tensor | None) -> None:
        """Replace, add or (None) drop tensors; `__` in a name stands for a dot."""
        tensors = self.tensors
        for name, value in changes.items():
            name = name.replace("__", ".")
            if value is None:
                del tensors[name]
            else:
                tensors[name] = value
        save_file(tensors, self.weights)

    def reconfigure(self, drop: str | None = None, **changes: object) -> None:
        path = self.path / "config.json"
        config = json.loads(path.read_text()) | changes
        config.pop(drop or "", None)
        path.write_text(json.dumps(config))

    def cut(self, parts: int = 3) -> dict[str, str]:
        """The weights in several files and an index; the index's map."""
        tensors = self.tensors
        names = sorted(tensors)
        weight_map = {}
        for index in range(parts):
            part = {name: tensors[name] for name in names[index::parts]}
            save_file(part, self.path / f"part-{index}.safetensors")
            weight_map |= dict.fromkeys(part, f"part-{index}.safetensors")
        self.weights.unlink()
        self.point(weight_map)
        return weight_map

    def point(self, weight_map: dict[str, str]) -> None:
        self.index.write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def published(tmp_path: Path) -> Folder:
    return Folder(tmp_path)
