"""Every kernel of `step.fatbin` as nvcc compiled it, and the instructions of one round on its aligned path."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.proof import disassembly, machine_code
from benchmarks.proof.traffic import bytes_moved, unread
from fasttrain.kernels import cuda
from fasttrain.kernels.trace import trace
from fasttrain.optim import RULES, STAGES
from fasttrain.precision.codecs import CODECS, POSITIVE, STOCHASTIC, code_dtype, codec
from fasttrain.rule import Rule

BYTES = {"F32": 4, "F64": 8, "BF16": 2, "F16": 2, "INT8": 1}
TOGETHER = 2  # packs that a thread loads before it computes, as kTogether in csrc/cuda/step.cu
EACH = 8  # elements of a lane in a tile, and two tiles together, as in csrc/cuda/kept.cuh
NUMBERS = {cuda.codec_name(base | flags): base | flags for base in range(len(CODECS))
           for flags in (0, POSITIVE, STOCHASTIC, POSITIVE | STOCHASTIC)}
BY_NAME: dict[str, Rule] = {rule.name: rule for rule in (*RULES, *STAGES)}
ENDS = re.compile(r"[FD](MUL|ADD|FMA|SETP)|MUFU|STS|LDS|STG|BRA|BSYNC|BSSY|BAR|EXIT")  # a run of loads
LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
ARITHMETIC = re.compile(r"[FD](MUL|ADD|FMA|SETP)|MUFU")


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
    text: str

    @cached_property
    def code(self) -> list[Instruction]:
        """The disassembler's lines."""
        return [Instruction(int(address, 16), code) for address, code in LINE.findall(self.text)]

    @cached_property
    def parts(self) -> tuple[str, tuple[str, str, str]]:
        """The rule's name, and the storages of p, g and the states."""
        _, rule, p, g, s = self.usage.name.split("_")
        return rule, (p, g, s)

    @cached_property
    def rule(self) -> Rule:
        return BY_NAME[self.parts[0]]

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
    def bytes(self) -> float | None:
        """That are moved for an element; None where kernels have no such number."""
        return 2 * sum(self.operands) - self.operands[1]

    @property
    def per_element(self) -> float | None:
        """Instructions of a round."""
        return len(self.aligned) / self.elements

    def round_accesses(self) -> tuple[dict[int, int], dict[int, int]]:
        """Loads and stores of a round by their width."""
        text = "\n".join(instruction.text for instruction in self.aligned)
        return disassembly.widths("LDG", text), disassembly.widths("STG", text)

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
        return bytes_moved(self.codecs)

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
    def sizes(self) -> tuple[list[int], list[int]] | None:
        """Bytes of an element of all that is read and of all that is written; None where that is not by elements."""
        kind, *kinds = self.usage.name.split("_")
        if kind == "stage":  # of what the rule reads: ptxas drops the rest
            dropped = unread(self.rule)
            written = zip([self.operands[0], *self.operands[2:]], trace(self.rule).changed, strict=True)
            return ([size for place, size in enumerate(self.operands) if place not in dropped],
                    [size for size, moved in written if moved])
        if kind not in ("squares", "move", "encode"):
            return None
        first, *others = (BYTES[name] for name in kinds)
        lost = others[1:] if kind == "move" else others
        return [first, *lost], {"squares": [], "move": others, "encode": [1, *lost]}[kind]

    @property
    def expected_loads(self) -> int:
        return sum(self.sizes[0]) * self.elements // 16 if self.sizes else 0

    @property
    def expected_stores(self) -> int:
        return sum(self.sizes[1]) * self.elements // 16 if self.sizes else 0

    @property
    def bytes(self) -> float | None:
        units = 4 / codec(NUMBERS["INT8"]).block if self.usage.name.startswith("encode_") else 0
        return sum(map(sum, self.sizes)) + units if self.sizes else None

    @property
    def per_element(self) -> float | None:
        if self.sizes is None:
            return None
        return len(self.usage.code.round) / (16 * self.round_accesses()[0][16] / sum(self.sizes[0]))

    def round_accesses(self) -> tuple[dict[int, int], dict[int, int]]:
        code = self.usage.code
        return tuple(code.accesses(operation, code.round) for operation in (machine_code.LOAD, machine_code.STORE))

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


def listing(cubin: bytes) -> dict[str, str]:
    """The disassembler's text of every kernel of a cubin."""
    return {part.split(maxsplit=1)[0]: part for part in disassembly.listing(cubin).split("Function : ")[1:]}


def compiled(fatbin: Path) -> list[Compiled]:
    """Every kernel of a fatbin, for every architecture in it."""
    cubins = list(extract(fatbin, "elf"))
    with ThreadPoolExecutor() as pool:  # the disassembler is a process of its own
        texts = list(pool.map(listing, (cubin for _, cubin in cubins)))
    return [kind_of(kernel.name)(arch, kernel, text[kernel.name])
            for (arch, cubin), text in zip(cubins, texts, strict=True) for kernel in disassembly.read(cubin)]


def kind_of(name: str) -> type[Compiled]:
    """What is known of a kernel, by its name."""
    return CompiledSums if reduces(name) else CompiledKept if name.startswith("kept_") else Compiled
