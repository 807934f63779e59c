"""What nvcc made of the CUDA kernels: the rows of `benchmarks.proof.table`, and docs/gpu-kernels.md from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.proof import disassembly, occupancy
from benchmarks.proof.paths import NUMBERS, Compiled, CompiledSums, extract, reduces
from fasttrain.kernels import cuda, native
from fasttrain.optim import RULES
from fasttrain.precision.codecs import POSITIVE, STOCHASTIC, codec

TEXT = """\
# The CUDA kernels, as compiled

Written by `make proof` from benchmarks/results/kernels.json, which has what is in `step.fatbin`; a test compares the
two where the compiler is the same. Compiler: {compiler}.

Each kernel steps every parameter of one rule and one combination of storages in one launch. A thread takes two packs
at a time: it issues all their loads, 16 bytes each, before the first of them is used. *Accesses* are the 16-byte loads
and stores of one such round. *Instructions* are those that one element costs on the aligned path, address arithmetic
and loop included, without the rare slow paths of division and root (denormals, NaN, overflow). *Occupancy* is the share
of its threads that a multiprocessor holds of such a kernel, which has blocks of 256. No kernel spills or uses local
memory. The codes are counted, not run: how fast they are is for the benchmarks to say. Rules of rarely used optimizers
are compiled in float32 and in float64 only.

| rule | p, g, states | bytes | accesses | {heads} |
|---|---|---|---|{lines}|
{rows}

Items that are not plain (codecs in the words of `fasttrain/precision/codecs.py`; P: of a state that is never negative,
S: rounded at random). A warp takes two tiles of 256 elements at a time, eight to a lane, in the same order: all loads,
16 bytes each but for codes of one byte, which are 8 bytes to a lane. *Accesses* are those of 16 and those of 8 bytes
that a lane makes, loads + stores, with those that zero a gradient. *Bytes* count units of blocks, and no zeros.
Clipping by value is counted in; places in shards that are cut by columns are not.

| rule | p, g, states | bytes | accesses | {heads} |
|---|---|---|---|{lines}|
{kept_rows}

Reductions: `squares` is pass A, `stage` a rule with sums or what follows one, `factored` Adafactor; `tree` adds what
they leave. Sums are made in float64 by warps. And buckets: `move` casts and scales (from, to, residual), `encode` makes
8-bit codes (from, residual), `sum` adds the chunks of all ranks (from, to). *In flight* are the 16-byte loads that
follow one another; *shared* the bytes of shared memory of a block; instructions are those of an element where kernels
have a loop over elements.

| kernel | bytes | in flight | shared | {heads} |
|---|---|---|---|{lines}|
{sums_rows}
"""


def compiler() -> str:
    """Whose code `step.fatbin` is."""
    _, cubin = next(extract(cuda.IMAGE, "elf"))
    return f"nvcc {native.build_info()['nvcc']}, ptxas {disassembly.compiler(cubin)}"


def row(kernel: Compiled) -> dict[str, Any]:
    """What is kept of a kernel for one architecture."""
    usage = kernel.usage
    loads, stores = kernel.round_accesses()
    return {"registers": usage.registers, "stack": usage.stack, "local": usage.local, "shared": usage.shared,
            "loads": named(loads), "stores": named(stores), "instructions": usage.instructions,
            "per_element": kernel.per_element and round(kernel.per_element, 2), "bytes": kernel.bytes,
            "occupancy": occupancy.occupancy(usage.code.arch, cuda.THREADS, usage.registers, usage.shared),
            **({"in_flight": kernel.in_flight} if isinstance(kernel, CompiledSums) else {})}


def named(counts: Mapping[int, int]) -> dict[str, int]:
    """With the keys that JSON has."""
    return {str(width): count for width, count in counts.items()}


def rows(found: Sequence[Compiled]) -> dict[str, dict[str, Any]]:
    """Every kernel for every architecture, in the order of `csrc`."""
    order = {name: place for place, name in enumerate(native.module().cuda_kernels())}
    kernels = sorted(found, key=lambda kernel: (order[kernel.usage.name], kernel.usage.code.arch))
    return {f"{kernel.usage.name} {kernel.arch}": row(kernel) for kernel in kernels}


# --- The page ---------------------------------------------------------------------------------------------------------

def page(compiler: str, rows: Mapping[str, Any]) -> str:
    """docs/gpu-kernels.md."""
    kernels: dict[str, dict[str, Any]] = {}
    for key, one in rows.items():
        name, arch = key.split()
        kernels.setdefault(name, {})[arch] = one
    archs = list(next(iter(kernels.values())))
    parts: dict[str, list[str]] = {"rows": [], "kept_rows": [], "sums_rows": []}
    for name, across in kernels.items():
        kind = "sums_rows" if reduces(name) else "kept_rows" if name.startswith("kept_") else "rows"
        if (cells := described(name, across[archs[0]])) is not None:
            cells += [", ".join([str(one["registers"]), *([f"{one['per_element']:.1f}"] if one["per_element"] else []),
                                 f"{one['occupancy']:.0%}"]) for one in across.values()]
            parts[kind].append("| " + " | ".join(cells) + " |")
    heads = " | ".join(f"{arch}: registers, instructions, occupancy" for arch in archs)
    return TEXT.format(compiler=compiler, heads=heads, lines="---|" * (len(archs) - 1) + "---",
                       **{name: "\n".join(lines) for name, lines in parts.items()})


def described(name: str, one: Mapping[str, Any]) -> list[str] | None:
    """The first cells of a kernel's line; None for the same code under a second name."""
    moved = "" if one["bytes"] is None else f"{one['bytes']:.2f}".rstrip("0").rstrip(".")
    if reduces(name):
        return [name, moved, str(one["in_flight"]), str(one["shared"])]
    rule, *kinds = name.split("_")[1:]
    accesses = ", ".join(f"{loads} + {stores}" for loads, stores in (
        (one["loads"].get(width, 0), one["stores"].get(width, 0)) for width in ("16", "8")) if loads + stores)
    if name.startswith("kept_"):
        return [rule, ", ".join(spelled(NUMBERS[kind]) for kind in kinds), moved, accesses]
    if rule in {rule.name for rule in RULES if not rule.state}:
        if kinds[2] != kinds[0]:
            return None  # as with the states kept as the parameter is
        kinds = kinds[:2]
    return [rule, ", ".join(kind.lower() for kind in kinds), moved, accesses]


def spelled(number: int) -> str:
    """A codec with its flags."""
    flags = " P" * bool(number & POSITIVE) + " S" * bool(number & STOCHASTIC)
    return codec(number).name + flags
