"""What Triton made of the kernels, compiled ahead for GPUs that are not here: the rows of `benchmarks.proof.table`.

Steps are those of the covering list (`benchmarks.proof.cases`). Each kernel with sums occurs in three storages or more
and on every architecture, each kind of bucket once; of the rest see `benchmarks.proof.products`, `losses` and `rows`.
"""

from __future__ import annotations

import ast
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

from benchmarks.proof import cases, disassembly, machine_code, occupancy
from benchmarks.proof.cases import ARCHITECTURES, BY_NAME, Case
from benchmarks.proof.traffic import bytes_moved, unread
from fasttrain.kernels import triton_factored, triton_pack, triton_stages, triton_sums
from fasttrain.kernels.trace import trace
from fasttrain.kernels.triton import BLOCK, compile_ahead, compile_kept_ahead
from fasttrain.optim import STAGES
from fasttrain.precision.codecs import NUMBER, code_dtype, codec

SIZES, SHORT = {0: 4, 1: 8, 2: 2, 3: 2}, {0: "f32", 1: "f64", 2: "bf16", 3: "f16"}  # of storages
INT8 = NUMBER["int8"]

# Kernels with sums: of a norm, the tree, every stage that sums, Adafactor's. Storages of what each reads, in order.
FACTORED = {"square_tile": ("g", 1), "move_lines": ("state", 1), "measure_tile": ("p, g", 2), "apply_tile": ("p, g", 2),
            "measure_whole": ("p, g, variance", 3), "apply_whole": ("p, g, variance", 3)}
STAGE_KINDS = {"f32": (0, 0, 0), "f64": (1, 1, 1), "bf16, bf16, f32": (2, 2, 0), "f16, f32, f16": (3, 0, 3)}
MEASURING = [rule for rule in STAGES if rule.sums]
SUMS = [("square", (storage,)) for storage in range(4)] + [("add_up", ())] * 3 + [
    (rule.name, (p, g, *(state,) * len(rule.state))) for rule in MEASURING for p, g, state in STAGE_KINDS.values()] + [
    (name, (storage,) * operands) for name, (_, operands) in FACTORED.items() for storage in (0, 1, 2)]
NAMES = list(dict.fromkeys(name for name, _ in SUMS))
SUMS_CASES = [(name, storages, ARCHITECTURES[(i + NAMES.index(name)) % 3]) for i, (name, storages) in enumerate(SUMS)]

# Of buckets: source, target and residual (-1: none) of a move; chunks, result, ranks and squares of a sum.
MOVES = ((0, 0, -1, 90), (0, 2, -1, 80), (2, 0, -1, 100), (1, 0, -1, 90), (3, 3, -1, 90), (0, 2, 0, 90), (2, 2, 2, 100),
         (0, INT8, 0, 80), (2, INT8, -1, 90))
BUCKET_SUMS = ((2, 0, 2, True, 90), (2, 2, 8, False, 80), (0, 0, 4, True, 100), (INT8, 0, 4, True, 90),
               (1, 1, 2, False, 90))


@dataclass(frozen=True)
class Ahead:
    """A kernel that can be compiled.

    Attributes:
        compile: returns what Triton does.
        elements: that a thread steps on its way through; None where the way is not by elements, or has a loop.
        bytes: that are moved for an element, if there is such a number.
        multiplies: matrices, by way of shared memory: what is read and multiplied is asked of the disassembler.
        looped: the way is one round of the loop that makes most accesses, and `elements` are those of a round.
    """

    name: str
    arch: int
    compile: Callable[[], Any]
    elements: float | None = None
    bytes: float | None = None
    multiplies: bool = False
    looped: bool = False


@dataclass(frozen=True)
class Made:
    """A kernel, compiled."""

    of: Ahead
    kernel: disassembly.Kernel
    threads: int
    shared: int
    ptx: str
    copies: dict[int, int]  # global to shared memory, by width
    cores: int  # instructions of tensor cores

    def row(self) -> dict[str, Any]:
        """What is kept of it."""
        kernel, code = self.kernel, self.kernel.code
        loads, stores = (code.accesses(operation, code.way) for operation in (machine_code.LOAD, machine_code.STORE))
        way = code.round if self.of.looped else code.way
        each = self.of.elements and round(len(way) / self.of.elements, 2)
        read = {"copies": named(self.copies), "cores": self.cores} if self.of.multiplies else {}
        return {"registers": kernel.registers, "stack": kernel.stack, "local": kernel.local, "shared": self.shared,
                "loads": named(loads), "stores": named(stores), **read, "instructions": kernel.instructions,
                "per_element": each, "bytes": self.of.bytes,
                "occupancy": occupancy.occupancy(self.of.arch, self.threads, kernel.registers, self.shared)}


def named(counts: Mapping[int, int]) -> dict[str, int]:
    """With the keys that JSON has."""
    return {str(width): count for width, count in counts.items()}


def make(ahead: Ahead) -> Made:
    """Compile."""
    compiled = ahead.compile()
    cubin = compiled.asm["cubin"]
    (kernel,) = disassembly.read(cubin)
    text = disassembly.listing(cubin) if ahead.multiplies else ""
    return Made(ahead, kernel, 32 * compiled.metadata.num_warps, compiled.metadata.shared, compiled.asm["ptx"],
                disassembly.widths("LDGSTS", text), len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA)\b", text)))


def make_all(wanted: Iterable[Ahead]) -> list[Made]:
    """Compile several at a time: Triton's passes and ptxas hold no lock of Python's.

    But one source is parsed at a time: Python 3.11 counts the depth of a syntax tree in one place for all threads, and
    raises SystemError where two are made at once.
    """
    parse, lock = ast.parse, threading.Lock()

    def alone(*arguments: Any, **options: Any) -> ast.AST:
        with lock:
            return parse(*arguments, **options)

    ast.parse = alone  # type: ignore[assignment]
    try:
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            return list(pool.map(make, wanted))
    finally:
        ast.parse = parse


@cache
def compiler() -> str:
    """Triton's version, and that of the ptxas that it carries, which leaves it in what it makes."""
    import triton

    cubin = triton_sums.compile_ahead("square", 1, 90).asm["cubin"]
    return f"triton {triton.__version__}, ptxas {disassembly.compiler(cubin)}"


# --- Which there are --------------------------------------------------------------------------------------------------

@cache
def listed() -> dict[str, Ahead]:
    """Every kernel of the table, by name."""
    from benchmarks.proof import losses, products, rows

    found = [*map(step, cases.listed()), *(sums(*case) for case in SUMS_CASES), *(move(*case) for case in MOVES),
             *(bucket_sum(*case) for case in BUCKET_SUMS), *products.listed(), *losses.listed(),
             *rows.listed()]
    return {one.name: one for one in found}


def step(case: Case) -> Ahead:
    """A step."""
    rule, codecs, wide = BY_NAME[case.rule], case.codecs, case.storage.startswith("f64")

    def compiled() -> Any:
        if case.plain:
            return compile_ahead(rule, codecs, wide, case.arch)
        return compile_kept_ahead(rule, codecs, case.clip, case.arch)

    return Ahead(str(case), case.arch, compiled, BLOCK[wide] / 128, bytes_moved(codecs, unread(rule)))


def sums(name: str, storages: tuple[int, ...], arch: int) -> Ahead:
    """A kernel with sums."""
    def compiled() -> Any:
        if name in FACTORED:
            return triton_factored.compile_ahead(name, storages, arch)
        if name in ("square", "add_up"):
            return triton_sums.compile_ahead(name, *(storages or (0,)), arch)
        return triton_stages.compile_stage_ahead(next(rule for rule in MEASURING if rule.name == name), storages, arch)

    return Ahead(f"sums {name}: {', '.join(SHORT[storage] for storage in storages)}: sm_{arch}", arch, compiled)


def move(source: int, target: int, lost: int, arch: int) -> Ahead:
    """A move into a bucket or out of one."""
    kinds = [spelled(one) for one in (source, target, lost) if one >= 0]
    bytes = sum(code_dtype(one).itemsize for one in (source, target, lost, lost) if one >= 0)
    units = 4 / codec(INT8).block if target == INT8 else 0
    return Ahead(f"move {', '.join(kinds)}: sm_{arch}", arch, lambda: triton_pack.compile_ahead(
        "move_chunk", arch, source=source, target=target, lost=lost, wide=1 in (source, target)), bucket_elements(),
        bytes + units)


def bucket_sum(source: int, target: int, ranks: int, squares: bool, arch: int) -> Ahead:
    """The sum of all ranks' chunks."""
    name = f"sum {spelled(source)}, {spelled(target)}: {ranks} ranks{', squares' * squares}: sm_{arch}"
    each = code_dtype(source).itemsize + (4 / codec(INT8).block if source == INT8 else 0)
    return Ahead(name, arch, lambda: triton_pack.compile_ahead(
        "sum_chunk", arch, source=source, target=target, ranks=ranks, squares=squares, wide=1 in (source, target)),
        bucket_elements(), ranks * each + code_dtype(target).itemsize)


def bucket_elements() -> float:
    """Of a thread."""
    return triton_pack.BLOCK / (32 * triton_pack.OPTIONS["num_warps"])


def spelled(number: int) -> str:
    return codec(number).name


# --- What their accesses must be --------------------------------------------------------------------------------------

def wide_accesses(case: Case) -> dict[str, dict[int, int]]:
    """How many accesses of 16, of 8 and of 4 bytes a thread makes to whole chunks, by what the codecs need.

    Of eight elements it has 16 bytes or more of every array, 8 of codes, 4 of pairs of codes. Items that are not plain
    may have their gradients zeroed.
    """
    elements, dropped = BLOCK[case.storage.startswith("f64")] / 128, unread(BY_NAME[case.rule])
    counts = {"loads": {16: 0, 8: 0, 4: 0}, "stores": {16: 0, 8: 0, 4: 0}}
    for place, number in enumerate(case.codecs):
        kept, nibbles = codec(number), number & 15 == NUMBER["int4"]
        sizes = [(0.5 if nibbles else float(code_dtype(number).itemsize), not kept.name.startswith("master"))]
        if kept.extra is not None and not kept.block:
            sizes.append((float(kept.extra.itemsize), True))
        for size, loaded in sizes:
            width = min(int(elements * size), 16)
            counts["loads"][width] += (loaded and place not in dropped) * int(elements * size) // width
            counts["stores"][width] += (place != 1 or not case.plain) * int(elements * size) // width
    return counts


def wide_sums_accesses(name: str, storages: tuple[int, ...]) -> tuple[int, int]:
    """How many loads and stores of 16 bytes a thread makes in one round, by what the kernel needs."""
    sizes = [SIZES[storage] for storage in storages]
    written = {"apply_tile": (0,), "apply_whole": (0, 2)}.get(name, ())
    read: Iterable[int] = range(len(sizes))
    if name in ("add_up", "move_lines"):
        return 0, 0
    if name in FACTORED:
        elements = triton_factored.elements_per_thread(name)
    elif name == "square":
        elements = triton_sums.elements_per_thread(storages) * triton_sums.together_in_norm(storages[0])
    else:
        graph = trace(next(rule for rule in MEASURING if rule.name == name))
        used = {argument for node in graph.live for argument in node.arguments}
        read = [index for index, node in enumerate(graph.inputs) if node in used]
        changed = zip((0, *range(2, len(sizes))), graph.changed, strict=True)
        written = tuple(index for index, moved in changed if moved)
        elements = triton_sums.elements_per_thread(storages) * triton_stages.together_in_stage(storages)
    return sum(elements * sizes[i] // 16 for i in read), sum(elements * sizes[i] // 16 for i in written)
