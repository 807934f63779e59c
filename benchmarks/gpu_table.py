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
from typing import Any

from benchmarks import disassembly
from fasttrain.kernels import cuda, native
from fasttrain.kernels.trace import trace
from fasttrain.optim import RULES, STAGES
from fasttrain.precision.codecs import CODECS, POSITIVE, STOCHASTIC, code_dtype, codec
from fasttrain.rule import Rule

BYTES = {"F32": 4, "F64": 8, "BF16": 2, "F16": 2}
TOGETHER = 2  # packs that a thread loads before it computes, as kTogether in csrc/cuda/step.cu
EACH = 8  # elements of a lane in a tile, and two tiles together, as in csrc/cuda/kept.cuh
NUMBERS = {cuda.codec_name(base | flags): base | flags for base in range(len(CODECS))
           for flags in (0, POSITIVE, STOCHASTIC, POSITIVE | STOCHASTIC)}
ENDS = re.compile(r"[FD](MUL|ADD|FMA|SETP)|MUFU|STS|LDS|STG|BRA|BSYNC|BSSY|BAR|EXIT")  # a run of loads
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

Items that are not plain (codecs in the words of `fasttrain/precision/codecs.py`; P: of a state that is never negative,
S: rounded at random). A warp takes two tiles of 256 elements at a time, eight to a lane, in the same order: all loads,
16 bytes each but for codes of one byte, which are 8 bytes to a lane. *Accesses* are those of 16 and those of 8 bytes
that a lane makes, loads + stores. *Bytes* count units of blocks. Clipping by value is counted in, zeroing of the
gradient and places in shards that are cut by columns are not.

| rule | p, g, states | bytes | accesses | {heads} |
|---|---|---|---|{lines}|
{kept_rows}

Reductions: `squares` is pass A, `stage` a rule with sums or what follows one, `factored` Adafactor; `tree` adds what
they leave. Sums are made in float64 by warps. And buckets: `move` casts and scales (from, to, residual), `encode` makes
8-bit codes (from, residual), `sum` adds the chunks of all ranks (from, to). *In flight* are the 16-byte loads that
follow one another; *shared* the bytes of shared memory of a block.

| kernel | in flight | shared | {registers} |
|---|---|---|{lines}|
{sums_rows}
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

    @property
    def kept(self) -> bool:
        """Whether its items are not plain."""
        return False

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
                slow = "CALL" in skipped and not {"STG.", "BSSY"} & set(skipped)
                shard = "I2F." in skipped and "STG." not in skipped  # divides places by the length of a run
                if not here.conditional or slow or shard:  # around a slow path
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


@dataclass(frozen=True)
class CompiledKept(Compiled):
    """One kernel for items that are not plain."""

    @cached_property
    def codecs(self) -> list[int]:
        """Of p, g and the states."""
        return [NUMBERS[name] for name in self.usage.name.split("_")[2:]]

    @property
    def kept(self) -> bool:
        return True

    @cached_property
    def arrays(self) -> list[tuple[int, int, int]]:
        """Bytes of an element of every array but units, and how often it is loaded and stored."""
        found = []
        for operand, number in enumerate(self.codecs):
            extra, stored = codec(number).extra, int(operand != 1)
            copy = codec(number).name.startswith("master")  # its first array is only written
            found.append((code_dtype(number).itemsize, int(not copy), stored))
            if extra is not None and not codec(number).block:
                found.append((extra.itemsize, 1, stored))
        return found

    @cached_property
    def elements(self) -> int:
        return TOGETHER * EACH

    @property
    def bytes(self) -> float:
        """That are read and written for an element."""
        units = sum(2 * 4 / codec(number).block for number in self.codecs if codec(number).block)
        return sum(size * (loads + stores) for size, loads, stores in self.arrays) + units

    def accesses(self, wide: bool) -> tuple[int, int]:
        """Loads and stores in a round, of 16 bytes or of 8."""
        width = 16 if wide else 8
        counts = [(self.elements * size // width, loads, stores) for size, loads, stores in self.arrays
                  if (size > 1) == wide]
        return sum(n * loads for n, loads, _ in counts), sum(n * stores for n, _, stores in counts)


@dataclass(frozen=True)
class CompiledSums(Compiled):
    """One kernel of a reduction."""

    @cached_property
    def parts(self) -> tuple[str, tuple[str, str, str]]:
        """Of a stage."""
        _, rule, p, g, s = self.usage.name.split("_")
        return rule, (p, g, s)

    @cached_property
    def rule(self) -> Rule:
        return next(rule for rule in STAGES if rule.name == self.parts[0])

    @property
    def expected_loads(self) -> int:
        """Of what the rule reads: ptxas drops the rest."""
        graph = trace(self.rule)
        read = {id(argument) for node in graph.live for argument in node.arguments}
        return sum(size * self.elements // 16 for size, operand in zip(self.operands, graph.inputs, strict=True)
                   if id(operand) in read)

    @property
    def expected_stores(self) -> int:
        sizes = [self.operands[0], *self.operands[2:]]
        changed = trace(self.rule).changed
        return sum(size * self.elements // 16 for size, moved in zip(sizes, changed, strict=True) if moved)

    @cached_property
    def in_flight(self) -> int:
        """The largest number of 16-byte loads that follow one another."""
        most = now = 0
        for instruction in self.code:
            if ENDS.match(instruction.op):
                now = 0
            now += instruction.op.startswith("LDG.E.128")
            most = max(most, now)
        return most


def reduces(name: str) -> bool:
    """Whether a kernel is one of a reduction, of buckets, or of a captured step beside its steps."""
    return not name.startswith(("step_", "kept_"))


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
        for kernel in disassembly.read(cubin):
            kept = CompiledKept if kernel.name.startswith("kept_") else Compiled
            kind = CompiledSums if reduces(kernel.name) else kept
            found.append(kind(arch, kernel, code[kernel.name]))
    return found


def table(found: list[Compiled]) -> str:
    """The document."""
    kernels = {(kernel.usage.name, kernel.arch): kernel for kernel in found}
    archs = sorted({arch for _, arch in kernels}, key=lambda arch: int(arch.removeprefix("sm_")))
    rows, kept_rows, sums_rows = [], [], []
    for name in native.module().cuda_kernels():
        across = [kernels[name, arch] for arch in archs]
        if isinstance(across[0], CompiledSums):
            cells = [name, str(across[0].in_flight), str(across[0].usage.shared),
                     *(str(kernel.usage.registers) for kernel in across)]
            sums_rows.append("| " + " | ".join(cells) + " |")
            continue
        if isinstance(across[0], CompiledKept):
            kept_rows.append(kept_row(across))
            continue
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
                       rows="\n".join(rows), kept_rows="\n".join(kept_rows),
                       sums_rows="\n".join(sums_rows), registers=" | ".join(f"{arch}: registers" for arch in archs))


def kept_row(across: list[Any]) -> str:
    """The line of a kernel of items that are not plain."""
    wide, narrow = across[0].accesses(True), across[0].accesses(False)
    accesses = f"{wide[0]} + {wide[1]}" + (f", {narrow[0]} + {narrow[1]}" if any(narrow) else "")
    cells = [across[0].usage.name.split("_")[1], ", ".join(map(spelled, across[0].codecs)),
             f"{across[0].bytes:.2f}".rstrip("0").rstrip("."), accesses,
             *(f"{kernel.usage.registers}, {kernel.per_element:.1f}" for kernel in across)]
    return "| " + " | ".join(cells) + " |"


def spelled(number: int) -> str:
    """A codec with its flags."""
    flags = " P" * bool(number & POSITIVE) + " S" * bool(number & STOCHASTIC)
    return codec(number).name + flags


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(table(compiled(cuda.IMAGE)))
