"""The kernels of buckets in Triton, compiled ahead of time for GPUs that are not here."""

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import disassembly
from fasttrain.kernels.triton_pack import BLOCK, OPTIONS, compile_ahead

PER_THREAD = BLOCK // (32 * OPTIONS["num_warps"])  # elements
BYTES = {-1: 0, 0: 4, 1: 8, 2: 2, 3: 2, 10: 1}
MOVES = {  # source, target, residual, architecture
    "fp32-fp32": (0, 0, -1, 90), "fp32-bf16": (0, 2, -1, 80), "bf16-fp32": (2, 0, -1, 100), "fp64-fp32": (1, 0, -1, 90),
    "fp16-fp16": (3, 3, -1, 90), "fp32-bf16-residual": (0, 2, 0, 90), "bf16-bf16-residual": (2, 2, 2, 100),
    "fp32-int8-residual": (0, 10, 0, 80), "bf16-int8": (2, 10, -1, 90)}
SUMS = {  # chunks, result, ranks, squares, architecture
    "bf16-fp32-2": (2, 0, 2, True, 90), "bf16-bf16-8": (2, 2, 8, False, 80), "fp32-fp32-4": (0, 0, 4, True, 100),
    "int8-fp32-4": (10, 0, 4, True, 90), "fp64-fp64-2": (1, 1, 2, False, 90)}


def check(kernel: disassembly.Kernel, read: list[int], written: list[int]) -> None:
    """Nothing spills, and a whole block is read and written in accesses of 16 bytes (of 8, eight codes a thread)."""
    assert (kernel.local, kernel.stack) == (0, 0)
    for codecs, accesses in ((read, kernel.loads), (written, kernel.stores)):
        for width in (8, 16):
            wanted = sum(PER_THREAD * BYTES[codec] // width for codec in codecs if (codec == 10) == (width == 8))
            assert accesses.get(width, 0) >= wanted, (width, accesses)
    # Beside these are the kernel's other half, for what is not whole, and the words of the table.
    assert 16 not in kernel.stores or kernel.stores[16] == sum(
        PER_THREAD * BYTES[codec] // 16 for codec in written if codec != 10)


@pytest.mark.skipif(disassembly.cuobjdump() is None, reason="no cuobjdump")
@pytest.mark.parametrize("name", MOVES)
def test_moves(name: str) -> None:
    source, target, lost, arch = MOVES[name]
    compiled = compile_ahead("move_chunk", arch, source=source, target=target, lost=lost, wide=1 in (source, target))
    check(disassembly.read(compiled.asm["cubin"])[0], [source, lost], [target, lost])
    assert "fma" not in compiled.asm["ptx"]


@pytest.mark.skipif(disassembly.cuobjdump() is None, reason="no cuobjdump")
@pytest.mark.parametrize("name", SUMS)
def test_sums(name: str) -> None:
    source, target, ranks, squares, arch = SUMS[name]
    compiled = compile_ahead("sum_chunk", arch, source=source, target=target, ranks=ranks, squares=squares,
                             wide=1 in (source, target))
    check(disassembly.read(compiled.asm["cubin"])[0], [source] * ranks, [target])
    assert "fma" not in compiled.asm["ptx"]
