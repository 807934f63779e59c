"""What nvcc made of the CUDA step: registers and instructions of every kernel of `step.fatbin`, for the documents.

    python -m benchmarks.gpu_table docs/gpu-kernels.md
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks import disassembly
from fasttrain.kernels import cuda, native
from fasttrain.optim import RULES
from fasttrain.rule import Rule

BYTES = {"F32": 4, "F64": 8, "BF16": 2, "F16": 2}
TOGETHER = 2  # packs that a thread loads before it computes, as kTogether in csrc/cuda/step.cu
ARITHMETIC = re.compile(r"[FD](MUL|ADD|FMA|SETP)|MUFU")

TEXT = """\
# The CUDA kernels, as compiled

Written by `python -m benchmarks.gpu_table docs/gpu-kernels.md` from the disassembly of `step.fatbin`; a test compares
it where the compiler is the same. Compiler: nvcc {nvcc}.

Each kernel steps every parameter of one rule and one combination of storages in one launch. A thread takes two packs
at a time: it issues all their loads, 16 bytes each, before the first of them is used. *Accesses* are the 16-byte loads
and stores of one such round. *Instructions* are those that one element costs on the aligned path, address arithmetic
and loop included, without the rare slow paths of division and root (denormals, NaN, overflow). No kernel spills or uses
local memory. The codes are counted, not run: how fast they are is for the benchmarks to say. Rules of rarely used
optimizers are compiled in float32 and in float64 only.

| rule | p, g, states | bytes | accesses | {heads} |
|---|---|---|---|{lines}|
{rows}
"""


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str

    @cached_property
    def op(self) -> str:
        return re.sub(r"^@!?\w+\s+", "", self.text).split()[0]

    @cached_property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"\b0x([0-9a-f]+)$", self.text) if self.op.startswith("BRA") else None
        return int(found.group(1), 16) if found else None

    @cached_property
    def conditional(self) -> bool:
        return self.text.startswith("@") or "," in self.text


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture."""

    arch: str
    usage: disassembly.Kernel
    code: list[Instruction]

    @cached_property
    def parts(self) -> tuple[str, tuple[str, str, str]]:
        """The rule's name, and the storages of p, g and the states."""
        _, rule, p, g, s = self.usage.name.split("_")
        return rule, (p, g, s)

    @cached_property
    def rule(self) -> Rule:
        return next(rule for rule in RULES if rule.name == self.parts[0])

    @cached_property
    def operands(self) -> list[int]:
        """Bytes per element of p, g and each state."""
        p, g, s = (BYTES[kind] for kind in self.parts[1])
        return [p, g, *[s] * len(self.rule.state)]

    @cached_property
    def elements(self) -> int:
        """Elements that a thread steps in one round."""
        return TOGETHER * 16 // min(self.operands)

    @property
    def expected_loads(self) -> int:
        return sum(size * self.elements // 16 for size in self.operands)

    @property
    def expected_stores(self) -> int:
        return self.expected_loads - self.operands[1] * self.elements // 16

    @cached_property
    def aligned(self) -> list[Instruction]:
        """The instructions of one round on the aligned path, in the order in which they are executed."""
        wide = [i for i, instruction in enumerate(self.code) if instruction.op.startswith("LDG.E.128")]
        first = self.code[wide[0]].address
        back = [i for i in self.code if i.target is not None and i.target <= first < i.address]
        head = max(i.target for i in back if i.target is not None)  # of the innermost loop around the loads
        at = {instruction.address: index for index, instruction in enumerate(self.code)}
        path: list[Instruction] = []
        index = at[head]
        while True:
            here = self.code[index]
            path.append(here)
            if here.target == head:
                return path
            index += 1
            if here.target is not None:
                skipped = [instruction.op[:4] for instruction in self.code[index : at[here.target]]]
                if not here.conditional or ("CALL" in skipped and "STG." not in skipped):  # around a slow path
                    index = at[here.target]
            if len(path) > len(self.code):
                raise ValueError(f"{self.usage.name} for {self.arch}: no way through the loop was found")

    @property
    def per_element(self) -> float:
        return len(self.aligned) / self.elements

    def count(self, pattern: str) -> int:
        """Instructions of the aligned path whose name begins so."""
        return sum(re.match(pattern, instruction.op) is not None for instruction in self.aligned)

    @property
    def loads_before_use(self) -> int:
        """Wide loads before the first arithmetic."""
        first = next(i for i, instruction in enumerate(self.aligned) if ARITHMETIC.match(instruction.op))
        return sum(instruction.op.startswith("LDG.E.128") for instruction in self.aligned[:first])


def extract(fatbin: Path, what: str) -> Iterator[tuple[str, bytes]]:
    """(architecture, content) of every "elf" or "ptx" in a fatbin."""
    tool = disassembly.cuobjdump()
    if tool is None:
        raise RuntimeError("no cuobjdump: install the CUDA toolkit or triton")
    with tempfile.TemporaryDirectory() as directory:
        command = [tool, f"-x{what}", "all", str(fatbin.resolve())]
        subprocess.run(command, check=True, cwd=directory, capture_output=True)
        for path in sorted(Path(directory).iterdir()):
            yield path.name.split(".")[-2], path.read_bytes()


def listing(cubin: bytes) -> dict[str, list[Instruction]]:
    """The code of every kernel of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(disassembly.cuobjdump()), "-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    pattern = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
    return {part.split()[0]: [Instruction(int(address, 16), code) for address, code in pattern.findall(part)]
            for part in text.split("Function : ")[1:]}


def compiled(fatbin: Path) -> list[Compiled]:
    """Every kernel of a fatbin, for every architecture in it."""
    found = []
    for arch, cubin in extract(fatbin, "elf"):
        code = listing(cubin)
        found += [Compiled(arch, kernel, code[kernel.name]) for kernel in disassembly.read(cubin)]
    return found


def table(found: list[Compiled]) -> str:
    """The document."""
    kernels = {(kernel.usage.name, kernel.arch): kernel for kernel in found}
    archs = sorted({arch for _, arch in kernels}, key=lambda arch: int(arch.removeprefix("sm_")))
    rows = []
    for name in native.module().cuda_kernels():
        across = [kernels[name, arch] for arch in archs]
        rule, kinds = across[0].parts
        if not across[0].rule.state and kinds[2] != kinds[0]:
            continue  # the same code as with the states kept as the parameter is
        kept = ", ".join(kind.lower() for kind in (kinds if across[0].rule.state else kinds[:2]))
        moved = 2 * sum(across[0].operands) - across[0].operands[1]
        cells = [rule, kept, str(moved), f"{across[0].expected_loads} + {across[0].expected_stores}",
                 *(f"{kernel.usage.registers}, {kernel.per_element:.1f}" for kernel in across)]
        rows.append("| " + " | ".join(cells) + " |")
    heads = " | ".join(f"{arch}: registers, instructions" for arch in archs)
    return TEXT.format(nvcc=native.build_info()["nvcc"], heads=heads, lines="---|" * (len(archs) - 1) + "---",
                       rows="\n".join(rows))


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(table(compiled(cuda.IMAGE)))
