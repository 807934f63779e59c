"""What Triton made of the step: ``python -m benchmarks.triton_table docs/triton-kernels.md``.

A covering list: each common rule with each combination of storages, on one architecture each, so that every pair of
(rule, architecture) and of (storages, architecture) occurs; each other rule in float32 and in float64.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import disassembly
from fasttrain.kernels.triton import compile_ahead
from fasttrain.optim import COMMON_RULES, RULES
from fasttrain.rule import Rule

ARCHITECTURES = (80, 90, 100)
# Storages of p, g and each state.
KEPT = {"f32, f32, f32": (0, 0, 0), "bf16, bf16, bf16": (2, 2, 2), "f16, f16, f16": (3, 3, 3),
        "f64, f64, f64": (1, 1, 1), "bf16, f32, bf16": (2, 0, 2), "bf16, bf16, f32": (2, 2, 0)}
CASES = [(rule, name, ARCHITECTURES[(i + j) % 3]) for i, rule in enumerate(RULES) for j, name in enumerate(KEPT)
         if rule in COMMON_RULES or name in ("f32, f32, f32", "f64, f64, f64")]

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
"""


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


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise SystemExit("usage: python -m benchmarks.triton_table PATH")
    import triton

    rows = "\n".join(row(*case, kernel(*case)) for case in CASES)
    Path(arguments[0]).write_text(TEXT.format(version=triton.__version__, rows=rows))


if __name__ == "__main__":
    main(sys.argv[1:])
