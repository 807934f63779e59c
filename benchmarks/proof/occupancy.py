"""How many threads of a kernel a multiprocessor holds at a time, by NVIDIA's rules of what a block takes.

Source: CUDA C++ Programming Guide, "Compute Capabilities" (tables of technical specifications), and the granularities
of NVIDIA's occupancy calculator.
"""

from __future__ import annotations

WARP = 32
WARPS = 64  # that a multiprocessor of sm_80, sm_90 or sm_100 holds
BLOCKS = 32
REGISTERS = 1 << 16
SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}  # bytes of a multiprocessor
SHARED_OF_SYSTEM = 1 << 10  # that each block takes beside its own
PARTS = 4  # of a multiprocessor, each with a quarter of the registers
REGISTER_UNIT, SHARED_UNIT = 256, 128  # registers of a warp, and bytes, are rounded up to these


def blocks(arch: int, threads: int, registers: int, shared: int = 0) -> int:
    """Blocks that a multiprocessor holds.

    Arguments:
        arch: 80, 90 or 100.
        threads: of a block.
        registers: of a thread.
        shared: bytes of a block.

    Example:
        >>> blocks(90, 256, 64), blocks(90, 256, 71), blocks(80, 128, 32), blocks(80, 256, 32, 48 << 10)
        (4, 3, 16, 3)
    """
    warps = -(-threads // WARP)
    each = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // PARTS // each * PARTS // warps
    taken = -(-(shared + SHARED_OF_SYSTEM) // SHARED_UNIT) * SHARED_UNIT
    return min(BLOCKS, WARPS // warps, by_registers, SHARED[arch] // taken)


def occupancy(arch: int, threads: int, registers: int, shared: int = 0) -> float:
    """The share of all warps that a multiprocessor could hold.

    Example:
        >>> occupancy(90, 256, 64), occupancy(100, 128, 255)
        (0.5, 0.125)
    """
    return blocks(arch, threads, registers, shared) * -(-threads // WARP) / WARPS
