"""What Triton made of the symmetric products.

Every form of the large tiles in bfloat16 on every architecture; of the others each form once, on one architecture each.
"""

from __future__ import annotations

import torch

from benchmarks.proof.triton import Ahead
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

def tiling(kind: str, arch: int) -> tuple[torch.dtype, Tiling]:
    """The dtype and the tiling of a row of the table."""
    dtype, cut = TILINGS[kind]
    return dtype, cut or LARGE.get(arch // 10, LARGE_ELSEWHERE)


def ahead(kind: str, form: str, arch: int) -> Ahead:
    """One of them."""
    dtype, cut = tiling(kind, arch)
    return Ahead(f"product {form}: {kind}: sm_{arch}", arch, lambda: triton_symmetric.compile_ahead(
        dtype, cut, *FORMS[form], arch, aligned="narrow" not in kind), multiplies=True)


def listed() -> list[Ahead]:
    """Those of the table."""
    return [ahead(*case) for case in CASES]
