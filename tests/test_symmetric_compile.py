"""Symmetric products compiled ahead for GPUs that are not here: no spills, wide accesses, tensor cores."""

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from proven import check_rows, made  # noqa: E402

from benchmarks.proof import disassembly, occupancy, products  # noqa: E402
from benchmarks.proof.triton import make  # noqa: E402
from fasttrain.kernels import triton_symmetric  # noqa: E402
from fasttrain.kernels.triton import compile_for  # noqa: E402

pytestmark = pytest.mark.skipif(disassembly.cuobjdump() is None, reason="no cuobjdump")
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that a processor has for programs
CASES = [pytest.param(*case, id="-".join(map(str, case)),
                      marks=() if case in products.CASES else pytest.mark.slow)
         for case in products.ALL_CASES]


def name_of(kind: str, form: str, arch: int) -> str:
    return products.ahead(kind, form, arch).name


@pytest.mark.parametrize("kind, form, arch", CASES)
def test_products(kind: str, form: str, arch: int) -> None:
    dtype, cut = products.tiling(kind, arch)
    listed = (kind, form, arch) in products.CASES
    found = made(name_of(kind, form, arch)) if listed else make(products.ahead(kind, form, arch))
    kernel = found.kernel
    assert (kernel.local, kernel.stack) == (0, 0)
    assert (found.cores > 0) == ("fp32" not in kind)
    assert found.shared <= min(SHARED[arch], 99 << 10)  # also that of sm_86 and sm_89
    if "narrow" not in kind:
        written = 3 * cut.tile**2 * dtype.itemsize // (16 * 32 * cut.warps)  # a tile on the diagonal; another, twice
        assert kernel.stores == {16: written}
        assert set(found.copies) == {16}
        assert set(kernel.loads) == ({16} if form == "b A + c A A" else set())
    if listed:
        check_rows([found])


def test_two_programs_share_a_processor_of_sm_90() -> None:
    for form in products.FORMS:
        found = made(name_of("large", form, 90))
        assert occupancy.blocks(90, found.threads, found.kernel.registers, found.shared) >= 2


@pytest.mark.parametrize("constants", [("tiles",), ("tiles", "side"), ("tiles", "side", "length")], ids=str)
def test_ones_are_constants(constants: tuple[str, ...]) -> None:
    """Triton compiles a version of its own for an integer that is one."""
    types = {"x": "*bf16", "out": "*bf16", "keep": "fp32", "scale": "fp32", "side": "i32", "length": "i32",
             "tiles": "i32"}
    cut = triton_symmetric.NARROW
    values = {"tall": "length" in constants, "polynomial": "length" not in constants, "tile": cut.tile,
              "depth": cut.depth, "group": triton_symmetric.GROUP, "interpreted": False, **dict.fromkeys(constants, 1)}
    compiled = compile_for(triton_symmetric.kernel(False), 90, triton_symmetric.options_of(cut),
                           {name: kind for name, kind in types.items() if name not in constants}, values)
    assert disassembly.read(compiled.asm["cubin"])[0].local == 0
