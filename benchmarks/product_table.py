"""What Triton made of the symmetric products: a section of docs/triton-kernels.md, as `benchmarks.triton_table` writes.

Every form of the large tiles in bfloat16 on every architecture; of the others each form once, on one architecture each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import torch

from benchmarks import disassembly
from fasttrain.kernels import triton_symmetric
from fasttrain.kernels.triton_symmetric import LARGE, LARGE_ELSEWHERE, NARROW, SINGLE, SINGLE_NARROW, SMALL, Tiling

ARCHITECTURES = (80, 90, 100)
FORMS = {"X X^T": (False, False), "X^T X": (True, False), "b A + c A A": (False, True)}  # tall, polynomial
TILINGS = {"large": (torch.bfloat16, None), "small": (torch.bfloat16, SMALL), "large fp16": (torch.float16, None),
           "fp32": (torch.float32, SINGLE), "narrow": (torch.bfloat16, NARROW),
           "narrow fp32": (torch.float32, SINGLE_NARROW)}
ALL_CASES = [(kind, form, arch) for kind in TILINGS for form in FORMS for arch in ARCHITECTURES]
CASES = [(kind, form, arch) for kind, form, arch in ALL_CASES
         if kind == "large" or (list(TILINGS).index(kind) + list(FORMS).index(form)) % 3 == ARCHITECTURES.index(arch)]

TEXT = """\
Symmetric products (`fasttrain.kernels.triton_symmetric`). *Tile*: the result's, and what is read of a row at a time.
*Shared*: bytes of shared memory of a program. *Copies* go from global to shared memory, *stores* back, 16 bytes each
(for narrow tiles, of rows that are no multiple of 16, an element each). *Tensor cores*: their instructions; float32 is
multiplied without them.

| product | dtype | tile | warps | sm | registers | shared | copies | stores | tensor cores | instructions |
|---|---|---|---|---|---|---|---|---|---|---|
{rows}
"""


@dataclass(frozen=True)
class Product:
    """One kernel, disassembled; `copies`: global to shared memory, by width; `cores`: tensor-core instructions."""

    kernel: disassembly.Kernel
    shared: int
    copies: dict[int, int]
    cores: int


def tiling(kind: str, arch: int) -> tuple[torch.dtype, Tiling]:
    """The dtype and the tiling of a row of the table."""
    dtype, cut = TILINGS[kind]
    return dtype, cut or LARGE.get(arch // 10, LARGE_ELSEWHERE)


@cache
def product(kind: str, form: str, arch: int) -> Product:
    """Compile and disassemble."""
    compiled = triton_symmetric.compile_ahead(*tiling(kind, arch), *FORMS[form], arch, aligned="narrow" not in kind)
    cubin = compiled.asm["cubin"]
    (kernel,), code = disassembly.read(cubin), disassembly.listing(cubin)
    return Product(kernel, compiled.metadata.shared, disassembly.widths("LDGSTS", code),
                   len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA)\b", code)))


def row(kind: str, form: str, arch: int) -> str:
    """Its line of the table."""
    (dtype, cut), found = tiling(kind, arch), product(kind, form, arch)
    copies, stores = (sum(counts.values()) for counts in (found.copies, found.kernel.stores))
    name = str(dtype).removeprefix("torch.") + ", narrow" * ("narrow" in kind)
    return (f"| {form} | {name} | {cut.tile} x {cut.depth} | {cut.warps} | {arch} | {found.kernel.registers} "
            f"| {found.shared} | {copies} | {stores} | {found.cores} | {found.kernel.instructions} |")


def text() -> str:
    """The section."""
    return TEXT.format(rows="\n".join(row(*case) for case in CASES))
