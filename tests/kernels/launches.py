"""What a Triton module would launch, compiled for a GPU that need not be there.

The public functions run on meta tensors with their kernels replaced by recorders; so what is
compiled has the block sizes, warps and options of a real call.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float8_e4m3fn: "*fp8e4nv",
}
OPTIONS = {"num_warps", "enable_fp_fusion", "maxnreg"}


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    kernel: JITFunction
    values: dict[str, Any]
    options: dict[str, Any]
    is_where_tensors_are: bool = True
    """Whether the device of a tensor was made the current one, which is where Triton launches."""


@dataclass(frozen=True)
class Machine:
    """What ptxas made of a kernel."""

    registers: int
    spilled_accesses: int
    vector_loads: int
    loads: int
    vector_stores: int
    stores: int
    shared_bytes: int
    barriers: int


class _Recorder:
    def __init__(self, kernel: JITFunction, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def record(*arguments: Any, **named: Any) -> None:
            options = {name: named.pop(name) for name in OPTIONS & named.keys()}
            values = dict(zip(self.kernel.arg_names, arguments, strict=False)) | named
            assert values.keys() == set(self.kernel.arg_names), values.keys()
            self.launches.append(Launch(self.kernel, values, options, _chosen_devices > 0))

        return record


# torch.cuda.device_of blocks that are open while launches are recorded.
_chosen_devices = 0


@contextmanager
def _device_of(tensor: torch.Tensor) -> Iterator[None]:
    """In the place of torch.cuda.device_of, which has nothing to choose for meta tensors."""
    global _chosen_devices
    _chosen_devices += 1
    try:
        yield
    finally:
        _chosen_devices -= 1


@contextmanager
def recorded(module: ModuleType) -> Iterator[list[Launch]]:
    """Launches of the module's kernels, which do not run meanwhile."""
    kernels = {name: value for name, value in vars(module).items() if type(value) is JITFunction}
    launches: list[Launch] = []
    device_of, torch.cuda.device_of = torch.cuda.device_of, _device_of  # type: ignore[misc]
    try:
        for name, kernel in kernels.items():
            setattr(module, name, _Recorder(kernel, launches))
        yield launches
    finally:
        torch.cuda.device_of = device_of  # type: ignore[misc]
        for name, kernel in kernels.items():
            setattr(module, name, kernel)


def compiled(launch: Launch, capability: int = 90) -> Machine:
    """The launch compiled for sm_`capability`, as Triton specializes it for aligned pointers."""
    assert launch.is_where_tensors_are, f"{launch.kernel.__name__} runs on whatever GPU is current"
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.values[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            wide = type(value) is int and value >= 2**31
            signature[parameter.name] = (
                "fp32" if isinstance(value, float) else "i64" if wide else "i32"
            )
            if type(value) is int and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    return _measured(triton.compile(source, target=target, options=launch.options).asm["cubin"])


def _measured(cubin: bytes) -> Machine:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run(
                [tool, flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:\d+ SHARED:(\d+)", usage)
    assert found, usage

    def count(pattern: str) -> int:
        return len(re.findall(pattern, sass))

    return Machine(
        registers=int(found[1]),
        spilled_accesses=count(r"\b(LDL|STL)\b"),
        # LDGSTS goes to shared memory at once: how pipelined loops load
        vector_loads=count(r"\bLDG(STS)?\.E[.\w]*\.128"),
        loads=count(r"\bLDG(STS)?\b"),
        vector_stores=count(r"\bSTG\.E[.\w]*\.128"),
        stores=count(r"\bSTG\b"),
        shared_bytes=int(found[2]),
        barriers=count(r"\bBAR\.SYNC"),
    )
