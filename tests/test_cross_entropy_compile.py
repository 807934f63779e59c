"""Cross-entropy compiled ahead for GPUs that are not here: no spills, wide accesses, few instructions."""

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from proven import check_rows, made, spills  # noqa: E402

from benchmarks.proof import disassembly, losses  # noqa: E402
from benchmarks.proof.triton import SIZES, make  # noqa: E402
from fasttrain.kernels import triton_cross_entropy  # noqa: E402

pytestmark = pytest.mark.skipif(disassembly.cuobjdump() is None, reason="no cuobjdump")
PER_BYTE = 7.6  # instructions that an H200 executes while its memory delivers a byte (tests/test_disassembly.py)
CASES = [pytest.param(*case, id="-".join(map(str, case)), marks=() if case in losses.CASES else pytest.mark.slow)
         for case in losses.ALL_CASES]


@pytest.mark.parametrize("name, storage, arch", CASES)
def test_passes(name: str, storage: int, arch: int) -> None:
    """A thread reads its 16 logits of a round in accesses of 16 bytes, and writes as many."""
    listed = (name, storage, arch) in losses.CASES
    ahead = losses.ahead(name, storage, arch)
    found = made(ahead.name) if listed else make(ahead)
    row, wide = found.row(), 16 * SIZES[storage] // 16
    assert spills(found) == (0, 0)
    writes = wide if name == "backward" else 0
    code = found.kernel.code
    in_round = code.accesses(disassembly.machine_code.LOAD, code.round), code.accesses(
        disassembly.machine_code.STORE, code.round)
    assert in_round == ({16: wide}, {16: writes} if writes else {})
    assert row["per_element"] <= PER_BYTE * row["bytes"]
    assert row["occupancy"] >= 0.25
    if listed:
        check_rows([found])


@pytest.mark.parametrize("name, ones", [
    ("measure_row", ("rows",)), ("measure_row", ("rows", "columns", "outer", "inner", "first", "vocabulary")),
    ("differentiate_row", ("rows", "out_rows", "columns", "outer", "inner", "out_outer", "out_inner", "vocabulary"))])
def test_ones_are_constants(name: str, ones: tuple[str, ...]) -> None:
    """Triton compiles a version of its own for an integer that is one."""
    compiled = triton_cross_entropy.compile_ahead(name, 2, 90, True, ones)
    assert disassembly.read(compiled.asm["cubin"])[0].local == 0


@pytest.mark.parametrize("storage, arch", [
    pytest.param(storage, arch, marks=() if storage * 10 + arch in (80, 110, 130) else pytest.mark.slow)
    for storage in losses.STORAGES for arch in losses.ARCHITECTURES])
@pytest.mark.parametrize("smooth", [False, True])
def test_parts_of_rows(storage: int, arch: int, smooth: bool) -> None:
    """Where classes are divided over ranks only five numbers are written: no spill, and a quarter of the threads."""
    code = disassembly.read(triton_cross_entropy.compile_ahead(
        "measure_row", storage, arch, smooth, finish=False).asm["cubin"])[0]
    assert (code.local, code.stack) == (0, 0)
    assert code.registers <= 65536 / (2048 / 4)
