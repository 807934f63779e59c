"""What Triton made of rows by index, which mixtures of experts send out and bring back: each kernel in every dtype."""

from __future__ import annotations

from benchmarks.proof.triton import SHORT, Ahead
from fasttrain.kernels import triton_rows

KERNELS = ("take_row", "combine_row", "differentiate_row")
STORAGES, ARCHITECTURES = (0, 2, 3), (80, 90, 100)
ALL_CASES = [(name, storage, arch) for name in KERNELS for storage in STORAGES for arch in ARCHITECTURES]
CASES = [case for place, case in enumerate(ALL_CASES) if place % 9 in (0, 4, 8)]  # each pair of two of them once


def ahead(name: str, storage: int, arch: int) -> Ahead:
    """One of them, for rows of whole blocks."""
    return Ahead(f"rows {name}: {SHORT[storage]}: sm_{arch}", arch,
                 lambda: triton_rows.compile_ahead(name, storage, arch, True))


def listed() -> list[Ahead]:
    """Those of the table."""
    return [ahead(*case) for case in CASES]
