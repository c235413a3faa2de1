"""Compiles a Triton kernel for Hopper on a machine without a GPU and reads the machine code."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

HOPPER, WARP = 90, 32


class Code(NamedTuple):
    """What counts in the machine code of a kernel."""

    registers: int
    stack_bytes: int
    local_accesses: int
    """Loads and stores of spilled registers."""
    wide_loads: int
    """Of 16 bytes, from global memory."""
    wide_stores: int


def compile_for_hopper(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int
) -> Code:
    """`types` as Triton writes them ("*bf16", "i32"); pointers are taken to be 16-byte aligned."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*")
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(
        ASTSource(kernel, signature, values, aligned),
        target=GPUTarget("cuda", HOPPER, WARP),
        options={"num_warps": warps},
    )
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run(
                [str(tool), option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return Code(
        registers=int(found[1]),
        stack_bytes=int(found[2]),
        local_accesses=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        wide_loads=len(re.findall(r"LDG\.E\S*\.128", code)),
        wide_stores=len(re.findall(r"STG\.E\S*\.128", code)),
    )
