"""What Triton made of the step: ``python -m benchmarks.triton_table docs/triton-kernels.md``.

A covering list: each common rule with each combination of storages, on one architecture each, so that every pair of
(rule, architecture) and of (storages, architecture) occurs; each other rule in float32 and in float64; each kernel with
sums in three storages or more, on every architecture. `benchmarks.product_table` adds the symmetric products.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import disassembly, product_table
from fasttrain.kernels import triton_factored, triton_stages, triton_sums
from fasttrain.kernels.trace import trace
from fasttrain.kernels.triton import compile_ahead, compile_kept_ahead
from fasttrain.optim import COMMON_RULES, ELEMENTWISE_RULES, RULES, STAGES
from fasttrain.precision.codecs import NUMBER, POSITIVE, STOCHASTIC, codec
from fasttrain.rule import Rule

ARCHITECTURES = (80, 90, 100)
SIZES, SHORT = {0: 4, 1: 8, 2: 2, 3: 2}, {0: "f32", 1: "f64", 2: "bf16", 3: "f16"}  # of storages
# Storages of p, g and each state.
KEPT = {"f32, f32, f32": (0, 0, 0), "bf16, bf16, bf16": (2, 2, 2), "f16, f16, f16": (3, 3, 3),
        "f64, f64, f64": (1, 1, 1), "bf16, f32, bf16": (2, 0, 2), "bf16, bf16, f32": (2, 2, 0)}
CASES = [(rule, name, ARCHITECTURES[(i + j) % 3]) for i, rule in enumerate(ELEMENTWISE_RULES)
         for j, name in enumerate(KEPT) if rule in COMMON_RULES or name in ("f32, f32, f32", "f64, f64, f64")]

# Codecs of p, g, the states and the EMA, in the same order of architectures; + P: positive, + S: at random.
STORAGES = (
    "AdamW: split16, bf16, int8, int8+P",
    "AdamW: split8, bf16, e4m3, e5m2+P",
    "AdamW: bf16+S, bf16, int8+S, int8+P+S",
    "AdamW: split16, bf16, bf16+S, bf16+S",
    "AdamW: split16, bf16, f32, f32",
    "AdamW: split16, f32, int4, int4+P",
    "AdamW: master_bf16, bf16, f32, f32",
    "AdamW: master_f16, f16, int8, int8+P, f16+S",
    "AdamW: kahan_bf16, bf16, int4+S, int4+P+S, bf16+S",
    "AdamW: f16+S, f16, e4m3+S, e5m2+P+S, f32",
    "AdamW: kahan_f16, f16, e5m2, e4m3+P",
    "AdamW: f32, f32, f32, f32, f32",
    "AdamWAmsgrad: split8, f32, f32, e5m2+P+S, int8+S, f16+S",
    "AdamWAmsgrad: split16, bf16, int8, int8+P, int8+P",
    "AdamWAmsgrad: kahan_bf16, bf16, int8, int8+P, int8+P, f32",
    "AdamL2: bf16, bf16, int8, int8+P, bf16+S",
    "Lion: split16, bf16, int8",
    "Lion: bf16+S, bf16, e4m3+S",
    "SGDMomentum: split8, bf16, int8+S, f32",
    "SGDNesterov: split16, bf16, bf16+S",
    "SGD: split16, bf16",
    "SGD: bf16+S, bf16, bf16+S",
)
KEPT_CASES = [(text, clip, ARCHITECTURES[(i + j) % 3]) for i, text in enumerate(STORAGES)
              for j, clip in enumerate((False, True))]

# Kernels with sums: a norm, the tree, every stage that sums, Adafactor's. Storages of what each reads, in order.
FACTORED = {"square_tile": ("g", 1), "move_lines": ("state", 1), "measure_tile": ("p, g", 2), "apply_tile": ("p, g", 2),
            "measure_whole": ("p, g, variance", 3), "apply_whole": ("p, g, variance", 3)}
STAGE_KINDS = {"f32": (0, 0, 0), "f64": (1, 1, 1), "bf16, bf16, f32": (2, 2, 0), "f16, f32, f16": (3, 0, 3)}
MEASURING = [rule for rule in STAGES if rule.sums]
SUMS = [("square", (storage,)) for storage in range(4)] + [("add_up", ())] * 3 + [
    (rule.name, (p, g, *(state,) * len(rule.state))) for rule in MEASURING for p, g, state in STAGE_KINDS.values()] + [
    (name, (storage,) * operands) for name, (_, operands) in FACTORED.items() for storage in (0, 1, 2)]
NAMES = list(dict.fromkeys(name for name, _ in SUMS))
SUMS_CASES = [(name, storages, ARCHITECTURES[(i + NAMES.index(name)) % 3]) for i, (name, storages) in enumerate(SUMS)]

TEXT = """\
# The Triton kernels, as compiled

Written by `python -m benchmarks.triton_table docs/triton-kernels.md` from the disassembly of kernels that were compiled
ahead of time; a test compiles them again and compares registers and instructions where Triton's version is the same.
Compiler: triton {version}.

One launch steps every parameter of one rule and one combination of storages. *Accesses* are the 16-byte loads and
stores of a thread on the aligned path. *Instructions* are all that are in the code, slow paths of division and root and
the masked path included. No kernel spills or uses local memory. The codes are counted, not run.

| rule | p, g, states | sm | registers | accesses | instructions |
|---|---|---|---|---|---|
{rows}

Items that are not plain: codecs of p, g, the states and the EMA (P: of a state that is never negative, S: rounded at
random); *clip*: with clipping by value. *Accesses* are the 16-byte loads and stores, then those of 8 bytes to codes of
one byte and those of 4 bytes to bytes of two codes, of which a thread has eight as of everything else.

| rule | p, g, states, EMA | clip | sm | registers | accesses | instructions |
|---|---|---|---|---|---|---|
{kept_rows}

Kernels with sums: `square` is a norm's first launch and `add_up` the second launch of whatever is summed; rules are
first stages; the others are Adafactor's. Storages are of what a kernel reads: p, g and states. What a stage does not
need is not loaded. *Accesses* as above, of one round of the walk, or of several where the compiler unrolled it.

| kernel | storages | sm | registers | accesses | instructions |
|---|---|---|---|---|---|
{sums_rows}

{products}"""


def kept(rule: Rule, name: str) -> tuple[int, ...]:
    """The storage of every operand of a rule."""
    p, g, state = KEPT[name]
    return (p, g, *(state,) * len(rule.state))


@cache
def compiled(rule: Rule, name: str, arch: int) -> Any:
    """What Triton returns."""
    return compile_ahead(rule, kept(rule, name), KEPT[name][0] == 1, arch)


def kernel(rule: Rule, name: str, arch: int) -> disassembly.Kernel:
    """One kernel, disassembled."""
    (found,) = disassembly.read(compiled(rule, name, arch).asm["cubin"])
    return found


def row(rule: Rule, name: str, arch: int, found: disassembly.Kernel) -> str:
    """Its line of the table."""
    return (f"| {rule.name} | {name} | {arch} | {found.registers} | {found.loads[16]} + {found.stores[16]} "
            f"| {found.instructions} |")


def codecs_of(text: str) -> tuple[Rule, tuple[int, ...]]:
    """The rule and the codecs of a line of `STORAGES`."""
    name, _, codecs = text.partition(": ")
    numbers = []
    for word in codecs.split(", "):
        base, *flags = word.split("+")
        numbers.append(NUMBER[base] + sum({"P": POSITIVE, "S": STOCHASTIC}[flag] for flag in flags))
    return next(rule for rule in RULES if rule.name == name), tuple(numbers)


@cache
def kept_kernel(text: str, clip: bool, arch: int) -> disassembly.Kernel:
    """One kernel of items that are not plain, disassembled."""
    (found,) = disassembly.read(compile_kept_ahead(*codecs_of(text), clip, arch).asm["cubin"])
    return found


def wide_accesses(text: str) -> dict[str, dict[int, int]]:
    """How many accesses of 16, of 8 and of 4 bytes a thread makes to whole chunks, by what the codecs need.

    A thread has eight elements of every array: 16 bytes or more, 8 of codes, 4 of pairs of codes.
    """
    counts = {"loads": {16: 0, 8: 0, 4: 0}, "stores": {16: 0, 8: 0, 4: 0}}
    for number in codecs_of(text)[1]:
        kept, nibbles = codec(number), number & 15 == NUMBER["int4"]
        sizes = [(0.5 if nibbles else float(kept.main.itemsize), not kept.name.startswith("master"))]
        if kept.extra is not None and not kept.block:
            sizes.append((float(kept.extra.itemsize), True))
        for size, loaded in sizes:
            width = min(int(8 * size), 16)
            counts["loads"][width] += loaded * int(8 * size) // width
            counts["stores"][width] += int(8 * size) // width  # of the gradient: zeros
    return counts


def kept_row(text: str, clip: bool, arch: int, found: disassembly.Kernel) -> str:
    """Its line of the table."""
    name, _, codecs = text.partition(": ")
    accesses = ", ".join(f"{loads} + {stores}" for loads, stores in
                         zip(*(wide_accesses(text)[what].values() for what in ("loads", "stores")), strict=True)
                         if loads + stores)
    return (f"| {name} | {codecs.replace('+', ' ')} | {'yes' if clip else ''} | {arch} | {found.registers} "
            f"| {accesses} | {found.instructions} |")


@cache
def sums_kernel(name: str, storages: tuple[int, ...], arch: int) -> disassembly.Kernel:
    """One kernel with sums, disassembled."""
    if name in FACTORED:
        made = triton_factored.compile_ahead(name, storages, arch)
    elif name in ("square", "add_up"):
        made = triton_sums.compile_ahead(name, *(storages or (0,)), arch)
    else:
        made = triton_stages.compile_stage_ahead(next(rule for rule in MEASURING if rule.name == name), storages, arch)
    (found,) = disassembly.read(made.asm["cubin"])
    return found


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


def sums_row(name: str, storages: tuple[int, ...], arch: int, found: disassembly.Kernel) -> str:
    """Its line of the table."""
    return (f"| {name} | {', '.join(SHORT[storage] for storage in storages)} | {arch} | {found.registers} "
            f"| {found.loads.get(16, 0)} + {found.stores.get(16, 0)} | {found.instructions} |")


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise SystemExit("usage: python -m benchmarks.triton_table PATH")
    import triton

    rows = "\n".join(row(*case, kernel(*case)) for case in CASES)
    kept_rows = "\n".join(kept_row(*case, kept_kernel(*case)) for case in KEPT_CASES)
    sums_rows = "\n".join(sums_row(*case, sums_kernel(*case)) for case in SUMS_CASES)
    Path(arguments[0]).write_text(TEXT.format(version=triton.__version__, rows=rows, kept_rows=kept_rows,
                                              sums_rows=sums_rows, products=product_table.text()))


if __name__ == "__main__":
    main(sys.argv[1:])
