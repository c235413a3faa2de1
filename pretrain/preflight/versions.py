"""What should be the same on all nodes of a job: versions, hashes of what it reads, devices."""

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from pretrain.compose import as_dict
from pretrain.config import TrainConfig
from pretrain.data.store import open_manifest
from pretrain.data.tokenizer import Tokenizer
from pretrain.engine.world import World
from pretrain.errors import PretrainError
from pretrain.preflight.nvml import driver_version

PACKAGES = ("torch", "deepspeed", "triton", "numpy", "webdataset")
CODE = ("pretrain", "pretrain_kernels")
NONE = "none"


def software_versions(driver: str) -> dict[str, str]:
    """Versions by name; `none` where there is no such thing. `driver` is the NVIDIA driver's."""
    found = {name: _version_of(name) for name in PACKAGES}
    has_nccl = torch.cuda.is_available() and torch.distributed.is_nccl_available()
    read_nccl: Callable[[], tuple[int, ...]] = torch.cuda.nccl.version
    return {
        "python": platform.python_version(),
        **found,
        "cuda": torch.version.cuda or NONE,
        "nccl": ".".join(str(part) for part in read_nccl()) if has_nccl else NONE,
        "driver": driver or NONE,
        "machine": platform.machine(),
    }


def environment(world: World) -> dict[str, Any]:
    """Rank 0's `software` by name, and how many ranks compute on which of the `devices`.

    All ranks must call.
    """
    names = world.gather_objects(_device_name(world.device))
    return {"software": software_versions(driver_version()), "devices": dict(Counter(names))}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"CPU: {next(models, platform.machine())}"


def input_hashes(config: TrainConfig) -> dict[str, str]:
    """sha256 of the code, the configuration, and the tokenizer and shards that are at hand."""
    values = as_dict(config)
    # how far doctor looks is no part of the run
    values.pop("doctor", None)
    found = {
        "code": hash_code(),
        "config": hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest(),
    }
    readers: dict[str, Callable[[], str]] = {
        "tokenizer": lambda: Tokenizer.load(config.tokenizer.path).sha256,
        "shards": lambda: open_manifest(config.data).fingerprint,
    }
    for name, read in readers.items():
        try:
            found[name] = read()
        except PretrainError:
            # check_data says what is wrong with it
            found[name] = NONE
    return found


def hash_code() -> str:
    """sha256 over the names and bytes of all Python files of our packages, wherever they lie."""
    digest = hashlib.sha256()
    for package in CODE:
        spec = find_spec(package)
        assert spec is not None
        for root in sorted(spec.submodule_search_locations or []):
            for path in sorted(Path(root).rglob("*.py")):
                content = path.read_bytes()
                digest.update(f"{package}/{path.relative_to(root)} {len(content)}\n".encode())
                digest.update(content)
    return digest.hexdigest()


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return NONE
