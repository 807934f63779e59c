"""What nvcc made of the CUDA step, read from the disassembly of every kernel for every architecture of the build."""

from __future__ import annotations

import re

import pytest
from helpers import needs_native

from benchmarks.proof import __main__ as command
from benchmarks.proof import cuda as listed
from benchmarks.proof import disassembly, paths, table
from fasttrain.kernels import cuda, native
from fasttrain.kernels.trace import trace
from fasttrain.precision.codecs import codec

PER_BYTE = 7.6  # instructions of a lane: 132 multiprocessors x 128 lanes x 1.98 GHz / 4.4 TB/s
ABOVE = {"kept_AdamW_BF16S_BF16_INT8_INT8P": 11.1, "kept_AdamW_SPLIT8_BF16_INT8_INT8P": 9.0}  # 10 and 12 bytes
NO_CODE = None if cuda.IMAGE.is_file() else f"no device code in this build: {native.build_info()['cuda_reason']}"
NO_TOOL = None if disassembly.cuobjdump() else "no cuobjdump: neither the CUDA toolkit nor triton is installed"
ESTIMATE = "sqrt.approx.ftz.f32"  # of a code; an exact product corrects it (square_code in csrc/cuda/eight.cuh)
# Squares of at most 24 bits are exact in float64, contracted or not.
EXACT = {name for name in (native.module().cuda_kernels() if native.load()[0] is not None else [])
         if name.startswith(("squares_", "sum_")) and not name.endswith("_F64")}
pytestmark = [needs_native, pytest.mark.skipif(bool(NO_CODE or NO_TOOL), reason=str(NO_CODE or NO_TOOL))]


@pytest.fixture(scope="module")
def everything():
    return paths.compiled(cuda.IMAGE)


@pytest.fixture(scope="module")
def kernels(everything):
    return [kernel for kernel in everything if not paths.reduces(kernel.usage.name)]


@pytest.fixture(scope="module")
def reductions(everything):
    return [kernel for kernel in everything if paths.reduces(kernel.usage.name)]


@pytest.fixture(scope="module")
def ptx():
    return dict(paths.extract(cuda.IMAGE, "ptx"))


def failures(kernels, holds):
    return [f"{kernel.usage.name} {kernel.arch}" for kernel in kernels if not holds(kernel)]


def test_every_kernel_is_there(everything):
    """Each kernel that the backend may ask for, for each architecture that the build claims."""
    archs = [target for target in native.build_info()["cuda"] if target.startswith("sm_")]
    assert archs
    expected = {(name, arch) for name in native.module().cuda_kernels() for arch in archs}
    assert {(kernel.usage.name, kernel.arch) for kernel in everything} == expected


def test_no_spills_and_no_local_memory(everything):
    assert not failures(everything, lambda kernel: kernel.usage.local == 0 and kernel.usage.stack == 0)


def test_registers_let_two_blocks_run(everything):
    """At most 128, so that a multiprocessor holds two blocks of 256 threads at least. One block has to do for Adan in
    float64: its six streams alone fill 48 registers.
    """
    others = [kernel for kernel in everything if not kernel.usage.name.startswith("step_Adan_F64")]
    assert not failures(others, lambda kernel: kernel.usage.registers <= 128)


def test_every_access_of_the_aligned_path_is_16_bytes(kernels):
    """As many as the operands need, no narrower one, and none wide anywhere else."""
    def holds(kernel):
        if kernel.kept:
            return True  # below
        loads = kernel.count(r"LDG\.E\.128"), kernel.count(r"LD[GLS]?\b"), kernel.usage.loads[16]
        stores = kernel.count(r"STG\.E\.128"), kernel.count(r"ST[GLS]?\b"), kernel.usage.stores[16]
        return set(loads) == {kernel.expected_loads} and set(stores) == {kernel.expected_stores}
    assert not failures(kernels, holds)


def test_accesses_of_whole_tiles_of_kept_items(kernels):
    """16 bytes, or 8 for codes of one byte; one load and one store more for each unit of a block. The gradient's zeros
    are wide too.
    """
    def holds(kernel):
        units = 2 * sum(codec(number).block > 0 for number in kernel.codecs)
        (wide_loads, wide_stores), (loads, stores) = kernel.accesses(True), kernel.accesses(False)
        zeros = 2 * 8 * 2 // 16
        return (kernel.count(r"LDG\.E\.128") == wide_loads == kernel.usage.loads[16]
                and kernel.count(r"LDG\.E\.64") == loads
                and kernel.count(r"LD[GLS]?\b") == wide_loads + loads + units
                and kernel.count(r"STG\.E\.128") == wide_stores + zeros == kernel.usage.stores[16]
                and kernel.count(r"STG\.E\.64") == stores
                and kernel.count(r"ST[GLS]?\b") == wide_stores + zeros + stores + units)
    found = [kernel for kernel in kernels if kernel.kept]
    assert len(found) >= 9
    assert not failures(found, holds)


def test_loads_are_in_flight_together(kernels):
    """Every load of a round is issued before the first arithmetic: two or more for each operand."""
    def holds(kernel):
        return kernel.loads_before_use == (kernel.accesses(True)[0] if kernel.kept else kernel.expected_loads)
    assert not failures(kernels, holds)
    assert all(kernel.expected_loads >= 2 * len(kernel.operands) for kernel in kernels if not kernel.kept)


def test_accesses_of_stages(reductions):
    """A round of the aligned path loads and stores 16 bytes at a time, what the rule changes only; every load of it is
    issued before the first arithmetic.
    """
    found = [kernel for kernel in reductions if kernel.usage.name.startswith("stage_")]
    assert found
    assert not failures(found, lambda kernel: kernel.usage.loads[16] == kernel.in_flight == kernel.expected_loads)
    assert not failures(found, lambda kernel: kernel.usage.stores.get(16, 0) == kernel.expected_stores)


def test_accesses_of_pass_a(reductions):
    """Four loads of 16 bytes follow one another, in the first round and in those after."""
    found = [kernel for kernel in reductions if kernel.usage.name.startswith("squares_")]
    assert not failures(found, lambda kernel: kernel.in_flight == 4 and kernel.usage.stores == {16: 1})
    assert not failures(found, lambda kernel: 4 * kernel.usage.registers * 256 <= 65536)  # four blocks run at a time
    assert all(size in (8, 16, narrow) for kernel in found for size in kernel.usage.loads
               for narrow in [paths.BYTES[kernel.usage.name.removeprefix("squares_")]])


def test_accesses_of_buckets(reductions):
    """Every load of a round is issued before the first arithmetic; codes are 8 bytes to a lane where they are made."""
    def moved(kernel):
        sizes = [paths.BYTES[kind] for kind in kernel.usage.name.split("_")[1:]]
        width = 16 // min(sizes)
        loads = sum(size * width // 16 for size in (sizes[0], *sizes[2:]))
        together = 4 if loads == 1 else 2
        stores = sum(size * width // 16 for size in sizes[1:])
        return (loads * together == kernel.in_flight == kernel.usage.loads[16]
                and kernel.usage.stores[16] == stores * together)

    def encoded(kernel):
        source, *lost = (paths.BYTES[kind] for kind in kernel.usage.name.split("_")[1:])
        together = 2 if source == 4 or lost else 4
        loads, stores = together * 8 * (source + sum(lost)) // 16, together * 8 * sum(lost) // 16
        return (loads == kernel.in_flight == kernel.usage.loads[16] and kernel.usage.stores.get(16, 0) == stores
                and kernel.usage.stores[8] == together)

    def added(kernel):
        chunk, result = ({"INT8": 1, **paths.BYTES}[kind] for kind in kernel.usage.name.split("_")[1:])
        loads = 4 if chunk == 1 else 2 * 2 * chunk // min(chunk, result)  # of 4 ranks; of two ranks two packs each
        stores = (1 if chunk == 1 else 2) * result // min(chunk, result) + 1  # and one for the sums
        return loads == kernel.in_flight and kernel.usage.stores[16] == stores

    for prefix, holds in (("move_", moved), ("encode_", encoded), ("sum_", added)):
        found = [kernel for kernel in reductions if kernel.usage.name.startswith(prefix)]
        assert found
        assert not failures(found, holds)


def test_the_largest_of_a_block_is_found_in_one_instruction(kernels):
    def holds(kernel):
        blocks = sum(codec(number).block > 0 for number in kernel.codecs)
        return kernel.count(r"C?REDUX") == 2 * blocks and kernel.count("SHFL") == 0
    assert not failures([kernel for kernel in kernels if kernel.kept], holds)


def test_fused_multiply_adds_belong_to_division_and_root(kernels):
    """ptxas builds division and root from them; a rule without either has none. The PTX says the rest."""
    kernels = [kernel for kernel in kernels if not kernel.kept]  # units are quotients
    plain = [kernel for kernel in kernels if not {"div", "sqrt"} & set(trace(kernel.rule).uses)]
    assert {kernel.rule.name for kernel in plain} >= {"SGD", "SGDMomentum", "Lion"}
    assert not failures(plain, lambda kernel: kernel.usage.fused == 0)
    others = [kernel for kernel in kernels if kernel not in plain]
    assert not failures(others, lambda kernel: kernel.count("[FD]FMA") % kernel.elements == 0)


def test_conversions_are_not_the_slow_ones(kernels):
    """F2F, F2I and I2F run at a fraction of the rate of a packed conversion, or of a sum that rounds to an integer."""
    assert not failures(kernels, lambda kernel: kernel.count(r"(F2F|F2I|I2F|FRND)\b") == 0)


def test_ptx_rounds_every_operation(ptx):
    """`.rn` on every sum, product, quotient and root: no later compiler may contract or approximate them."""
    assert ptx
    for arch, content in ptx.items():
        text = content.decode(errors="replace")
        fused = [entry for entry in text.split(".entry ")[1:] if "fma." in entry]
        assert {entry.split("(")[0] for entry in fused} == EXACT, arch
        assert {found for entry in fused for found in re.findall(r"fma[.\w]+", entry)} == {"fma.rn.f64"}, arch  # exact
        arithmetic = r"\b((?:add|sub|mul|div|sqrt|fma|mad|rcp|rsqrt|ex2)(?:\.\w+)*\.f(?:16|32|64))\b"
        operations = set(re.findall(arithmetic, text)) - {ESTIMATE}
        kinds = {f"{op}.rn.f{width}" for op in ("add", "sub", "mul", "div", "sqrt") for width in (32, 64)}
        kinds |= {"rcp.rn.f32", "fma.rn.f64"}  # 1 / x, and the above
        assert operations == kinds, arch
        assert ".ftz" not in text.replace(ESTIMATE, ""), arch
        assert not re.findall(r"\b(?:ld|st)\.local|\.local\b", text), arch


def test_ptx_calls_nothing(ptx):
    """Everything is inlined: a call would need a stack."""
    for arch, content in ptx.items():
        assert not re.search(r"^\s*call\b", content.decode(errors="replace"), re.MULTILINE), arch


# --- The table --------------------------------------------------------------------------------------------------------

def test_rows(everything):
    """As they are committed, where the compiler is the same."""
    changed = table.differences("cuda", listed.compiler(), listed.rows(everything))
    if changed is None:
        pytest.skip(f"the table is of {table.newest('cuda')[0]}, this build of {listed.compiler()}")
    assert not changed, "\n".join([*changed, table.AGAIN])
    assert table.missing("cuda", set(listed.rows(everything))) == set(), table.AGAIN


def test_ceilings():
    """Of everything that is committed. A multiprocessor of an H200 executes 7.6 instructions while memory delivers a
    byte: a kernel that needs more waits for itself.
    """
    rows = table.newest("cuda")[1]
    most = {name: row["per_element"] / row["bytes"] for name, row in rows.items() if row["per_element"]}
    over = {name.split()[0] for name, each in most.items() if each > PER_BYTE}
    assert over == set(ABOVE)
    assert {name: each for name, each in most.items() if each > ABOVE.get(name.split()[0], PER_BYTE)} == {}
    assert [name for name, row in rows.items() if row["local"] or row["stack"]] == []
    assert [name for name, row in rows.items() if row["occupancy"] < 0.25] == ["step_Adan_F64_F64_F64 sm_100"]


def test_page():
    assert (command.DOCS / "gpu-kernels.md").read_text() == listed.page(*table.newest("cuda")), "make proof"


# --- What reads the code ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("every", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_machine_code_is_what_the_disassembler_shows(everything, every):
    """Every number that is read from bits, and every branch."""
    for kernel in everything[::every]:
        code, lines = kernel.usage.code, kernel.code
        shown = (disassembly.widths("LDG", kernel.text), disassembly.widths("STG", kernel.text),
                 sum(line.op.startswith(("LDL", "STL")) for line in lines),
                 sum(line.op.startswith(("FFMA", "DFMA")) for line in lines))
        assert (kernel.usage.loads, kernel.usage.stores, kernel.usage.local, kernel.usage.fused) == shown
        assert len(code) == len(lines)
        assert code.targets == [None if line.target is None else line.target // 16 for line in lines]
        branches = [place for place, line in enumerate(lines) if line.target is not None]
        assert [code.predicated[place] for place in branches] == [lines[place].conditional for place in branches]


def test_the_shortest_way_is_the_aligned_path(kernels):
    """Two ways to find it: here by the text, there as the way with most 16-byte accesses. RAdam's shortest way leaves
    out what its first steps do not need.
    """
    plain = [kernel for kernel in kernels if not kernel.kept and kernel.rule.name != "RAdam"]
    assert not failures(plain, lambda kernel: len(kernel.usage.code.round) == len(kernel.aligned))
