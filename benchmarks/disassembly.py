"""What a compiler made of a kernel: memory accesses by width, registers, spills and instruction counts of a cubin."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


def cuobjdump() -> str | None:
    """The disassembler: of the CUDA toolkit, else the one that Triton's package carries."""
    found = shutil.which("cuobjdump")
    triton = find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        carried = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
        found = str(carried) if carried.is_file() else None
    return found


@dataclass(frozen=True)
class Kernel:
    """One kernel of a cubin.

    Attributes:
        name: its symbol.
        registers, stack: per thread; stack in bytes.
        loads, stores: global accesses by their width in bytes, counted in the code.
        local: instructions that touch local memory (spills, indexed arrays).
        instructions: all of them, counted in the code.
        fused: fused multiply-adds in the code.
        shared: bytes of shared memory of a block.
    """

    name: str
    registers: int
    stack: int
    loads: dict[int, int]
    stores: dict[int, int]
    local: int
    instructions: int
    fused: int
    shared: int


def listing(cubin: bytes) -> str:
    """The instructions of a cubin, as text."""
    return _shown(cubin, "-sass")[0]


def _shown(cubin: bytes, *options: str) -> list[str]:
    tool = cuobjdump()
    if tool is None:
        raise RuntimeError("no cuobjdump: install the CUDA toolkit or triton")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "kernel.cubin")
        path.write_bytes(cubin)
        return [subprocess.run([tool, option, str(path)], check=True, capture_output=True, text=True).stdout
                for option in options]


def read(cubin: bytes) -> list[Kernel]:
    """Disassemble a cubin."""
    code, usage = _shown(cubin, "-sass", "-res-usage")
    resources = {name: tuple(map(int, numbers)) for name, *numbers
                 in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)}
    kernels = []
    for part in code.split("Function : ")[1:]:
        name = part.split()[0]
        kernels.append(Kernel(
            name, *resources[name][:2], loads=widths("LDG", part), stores=widths("STG", part),
            local=len(re.findall(r"\b(?:LDL|STL)\b", part)),
            instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", part, re.MULTILINE)),
            fused=len(re.findall(r"\b[FD]FMA\b", part)), shared=resources[name][2]))
    return kernels


def widths(access: str, code: str) -> dict[int, int]:
    """How often each width in bytes occurs among LDG, STG or LDGSTS (global to shared memory) instructions."""
    count: Counter[int] = Counter()
    for modifiers in re.findall(rf"\b{access}\b((?:\.\w+)*)", code):
        size = re.search(r"\.(?:[US]?(8|16)|(32|64|128))\b", modifiers)
        count[int(size.group(1) or size.group(2)) // 8 if size else 4] += 1
    return dict(sorted(count.items()))
