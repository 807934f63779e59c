"""What a compiler made of a kernel: memory accesses by width, registers, spills and instruction counts of a cubin."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from benchmarks.proof import machine_code


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
        shared: bytes of shared memory of a block that are known to the compiler.
        code: its instructions.
    """

    name: str
    registers: int
    stack: int
    shared: int
    code: machine_code.Code

    @cached_property
    def loads(self) -> dict[int, int]:
        """Global loads by their width in bytes, counted in the code."""
        return self.code.accesses(machine_code.LOAD)

    @cached_property
    def stores(self) -> dict[int, int]:
        """Global stores, likewise."""
        return self.code.accesses(machine_code.STORE)

    @property
    def local(self) -> int:
        """Instructions that touch local memory (spills, indexed arrays)."""
        return self.code.count(*machine_code.LOCAL)

    @property
    def instructions(self) -> int:
        """All of them, counted in the code."""
        return len(self.code)

    @property
    def fused(self) -> int:
        """Fused multiply-adds in the code."""
        return self.code.count(*machine_code.FUSED)


def listing(cubin: bytes) -> str:
    """The instructions of a cubin, as text."""
    return _said(cubin, "-sass")


def _said(cubin: bytes, option: str) -> str:
    tool = cuobjdump()
    if tool is None:
        raise RuntimeError("no cuobjdump: install the CUDA toolkit or triton")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "kernel.cubin")
        path.write_bytes(cubin)
        return subprocess.run([tool, option, str(path)], check=True, capture_output=True, text=True).stdout


def read(cubin: bytes) -> list[Kernel]:
    """What the kernels of a cubin take and do."""
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", _said(cubin, "-res-usage"))
    code = machine_code.kernels(cubin)
    return [Kernel(name, int(registers), int(stack), int(shared), code[name])
            for name, registers, stack, shared in found]


def compiler(cubin: bytes) -> str:
    """The version of the ptxas that made a cubin, which it left there."""
    found = re.search(rb"Cuda compilation tools, release [\d.]+, (V[\d.]+)", cubin)
    return found.group(1).decode() if found else "unknown"


def widths(access: str, code: str) -> dict[int, int]:
    """How often each width in bytes occurs among LDG, STG or LDGSTS (global to shared memory) instructions."""
    count: Counter[int] = Counter()
    for modifiers in re.findall(rf"\b{access}\b((?:\.\w+)*)", code):
        size = re.search(r"\.(?:[US]?(8|16)|(32|64|128))\b", modifiers)
        count[int(size.group(1) or size.group(2)) // 8 if size else 4] += 1
    return dict(sorted(count.items()))
