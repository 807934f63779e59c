"""Every Triton kernel, compiled ahead of time for GPUs that are not here, and what the disassembly shows."""

from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import disassembly, triton_table  # noqa: E402
from fasttrain.kernels import triton_sums  # noqa: E402
from fasttrain.kernels.triton import BLOCK, OPTIONS, compile_kept_ahead  # noqa: E402
from fasttrain.optim import RULES  # noqa: E402

BYTES = {0: 4, 1: 8, 2: 2, 3: 2}
TABLE = (Path(__file__).parents[1] / "docs/triton-kernels.md").read_text()
NAMES = [f"{rule.name}-{name.replace(', ', '-')}-sm_{arch}" for rule, name, arch in triton_table.CASES]


@pytest.mark.skipif(disassembly.cuobjdump() is None, reason="no cuobjdump")
@pytest.mark.parametrize("rule, name, arch", triton_table.CASES, ids=NAMES)
def test_accesses_are_16_bytes_and_nothing_spills(rule, name, arch):
    kept = triton_table.kept(rule, name)
    kernel = triton_table.kernel(rule, name, arch)
    assert (kernel.local, kernel.stack) == (0, 0)
    per_thread = BLOCK[kept[0] == 1] // (32 * OPTIONS["num_warps"])
    assert kernel.loads[16] == sum(per_thread * BYTES[storage] // 16 for storage in kept)
    assert kernel.stores[16] == sum(per_thread * BYTES[storage] // 16 for i, storage in enumerate(kept) if i != 1)
    if f"triton {triton.__version__}." in TABLE:
        assert triton_table.row(rule, name, arch, kernel) in TABLE, "run python -m benchmarks.triton_table"


# Each storage once, with clipping or without; the other one is slow.
KEPT = [pytest.param(*case, id=f"{case[0].replace(', ', '-').replace(': ', '-')}-{'clip-' * case[1]}sm_{case[2]}",
                     marks=[pytest.mark.slow] if i % 2 == i // 2 % 2 else [])
        for i, case in enumerate(triton_table.KEPT_CASES)]


@pytest.mark.skipif(disassembly.cuobjdump() is None, reason="no cuobjdump")
@pytest.mark.parametrize("text, clip, arch", KEPT)
def test_kept_items_in_wide_accesses(text, clip, arch):
    """16 bytes, 8 to codes and 4 to pairs of codes; nothing spills. Narrower ones are of units and odd ends."""
    kernel, wanted = triton_table.kept_kernel(text, clip, arch), triton_table.wide_accesses(text)
    assert (kernel.local, kernel.stack) == (0, 0)
    assert (kernel.loads[16], kernel.stores[16]) == (wanted["loads"][16], wanted["stores"][16])
    assert kernel.stores.get(8, 0) == wanted["stores"][8]
    assert all(kernel.loads.get(width, 0) >= wanted["loads"][width] for width in (8, 4))
    assert kernel.stores.get(4, 0) >= wanted["stores"][4]
    if f"triton {triton.__version__}." in TABLE:
        assert triton_table.kept_row(text, clip, arch, kernel) in TABLE, "run python -m benchmarks.triton_table"


@pytest.mark.skipif(disassembly.cuobjdump() is None, reason="no cuobjdump")
@pytest.mark.parametrize("name, storages, arch", triton_table.SUMS_CASES,
                         ids=[f"{name}-{''.join(map(str, kept))}-sm_{arch}"
                              for name, kept, arch in triton_table.SUMS_CASES])
def test_kernels_with_sums(name, storages, arch):
    """Nothing spills; the aligned path's accesses are 16 bytes, in as many rounds as the compiler unrolled."""
    kernel = triton_table.sums_kernel(name, storages, arch)
    loads, stores = triton_table.wide_sums_accesses(name, storages)
    assert (kernel.local, kernel.stack) == (0, 0)
    if loads:
        rounds, rest = divmod(kernel.loads[16], loads)
        assert rest == 0
        assert rounds in (1, 2, 4)
        assert kernel.stores.get(16, 0) == rounds * stores
    if f"triton {triton.__version__}." in TABLE:
        assert triton_table.sums_row(name, storages, arch, kernel) in TABLE, "run python -m benchmarks.triton_table"


def test_a_norm_reads_before_it_adds():
    """Sixteen loads are in flight in each thread: no sum stands between them."""
    compiled = triton_sums.compile_ahead("square", 0, 90)
    code = disassembly.listing(compiled.asm["cubin"])
    first = code.index("LDG.E.128")
    assert code[first : code.index("DFMA", first)].count("LDG.E.128") == 16


def test_kept_items_are_not_contracted():
    """Rules without division or root, in codecs that have none."""
    compiled = compile_kept_ahead(*triton_table.codecs_of("SGDMomentum: split16, bf16, f32, f32"), True, 90)
    assert "fma" not in compiled.asm["ptx"]


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.name.startswith("SGD")], ids=lambda rule: rule.name)
def test_nothing_is_contracted(rule):
    """Rules without division or root have no fused multiply-add at all: contraction would change bits."""
    assert "fma" not in triton_table.compiled(rule, "f32, f32, f32", 90).asm["ptx"]
