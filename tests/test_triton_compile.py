"""Every Triton kernel of the table, compiled ahead of time for GPUs that are not here, and what its code shows."""

import re
from itertools import product

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from proven import check_rows, spills  # noqa: E402

from benchmarks.proof import __main__ as command  # noqa: E402
from benchmarks.proof import cases, disassembly, table, triton_page  # noqa: E402
from benchmarks.proof import triton as listed  # noqa: E402
from fasttrain.kernels import triton_sums  # noqa: E402
from fasttrain.kernels.triton import compile_kept_ahead  # noqa: E402

pytestmark = pytest.mark.skipif(disassembly.cuobjdump() is None, reason="no cuobjdump")

PER_BYTE = {True: 4.4, False: 18.0}  # instructions: plain or with fp32 states; others
MOST_SPILLED = (34, 72)  # instructions, bytes of stack


def may_spill(case: cases.Case) -> bool:
    """Three states and an EMA, all fp16 rounded at random: a thread has more numbers than registers."""
    return case.storage == "f16+S, f16, f16+S" and "EMA" in case.layout and len(cases.BY_NAME[case.rule].state) >= 3


def check_step(case: cases.Case, found: listed.Made) -> None:
    """Whole chunks are read and written in 16 bytes, codes in 8, pairs of codes in 4; nothing spills.

    Narrower ones than that are of units of blocks and of odd ends.
    """
    name, kernel, wanted = str(case), found.kernel, listed.wide_accesses(case)
    most = MOST_SPILLED if may_spill(case) else (0, 0)
    assert all(spilled <= limit for spilled, limit in zip(spills(found), most, strict=True)), (name, spills(found))
    assert kernel.loads.get(16, 0) == wanted["loads"][16], name
    assert kernel.stores.get(16, 0) == wanted["stores"][16], name
    for width in (8, 4):
        assert kernel.loads.get(width, 0) >= wanted["loads"][width], name
        assert kernel.stores.get(width, 0) >= wanted["stores"][width], name
    row = found.row()  # of the aligned path
    assert (row["loads"]["16"], row["stores"]["16"]) == (wanted["loads"][16], wanted["stores"][16]), name
    assert set(row["stores"]) <= ({"16"} if case.plain else {"16", "8", "4"}), name


@pytest.mark.parametrize("rule", cases.BY_NAME)
def test_steps(rule):
    """Those of the covering list."""
    wanted = [case for case in cases.listed() if case.rule == rule]
    found = listed.make_all(map(listed.step, wanted))
    for case, made in zip(wanted, found, strict=True):
        check_step(case, made)
        if rule.startswith("SGD") and case.plain:  # neither division nor root: contraction would change bits
            assert "fma" not in made.ptx, made.of.name
    check_rows(found)


@pytest.mark.slow
@pytest.mark.parametrize("rule", cases.BY_NAME)
def test_all_steps(rule):
    """The full product of storages, layouts and architectures."""
    wanted = cases.full(rule)
    for case, made in zip(wanted, listed.make_all(map(listed.step, wanted)), strict=True):
        check_step(case, made)


def test_kernels_with_sums():
    """Nothing spills; the aligned path's accesses are 16 bytes, in as many rounds as the compiler unrolled."""
    kernels = [listed.sums(*case) for case in listed.SUMS_CASES]
    found = listed.make_all(kernels)
    for (name, storages, _), made in zip(listed.SUMS_CASES, found, strict=True):
        loads, stores = listed.wide_sums_accesses(name, storages)
        assert spills(made) == (0, 0), made.of.name
        if loads:
            rounds, rest = divmod(made.kernel.loads[16], loads)
            assert (rest, rounds in (1, 2, 4)) == (0, True), made.of.name
            assert made.kernel.stores.get(16, 0) == rounds * stores, made.of.name
    check_rows(found)


def test_buckets():
    """Nothing spills, and a whole block is read and written in accesses of 16 bytes (of 8, eight codes a thread)."""
    kernels = {listed.move(*one): ([one[0], one[2]], [one[1], one[2]]) for one in listed.MOVES}
    kernels |= {listed.bucket_sum(*one): ([one[0]] * one[2], [one[1]]) for one in listed.BUCKET_SUMS}
    found, each = listed.make_all(kernels), int(listed.bucket_elements())
    for made, (read, written) in zip(found, kernels.values(), strict=True):
        assert spills(made) == (0, 0), made.of.name
        assert "fma" not in made.ptx, made.of.name
        for codecs, accesses in ((read, made.kernel.loads), (written, made.kernel.stores)):
            sizes = [listed.code_dtype(one).itemsize for one in codecs if one >= 0]
            wide = sum(each * size // 16 for size in sizes if size > 1)
            assert accesses.get(16, 0) >= wide, made.of.name
            assert accesses.get(8, 0) >= each // 8 * sizes.count(1), made.of.name
        # Beside these are the kernel's other half, for what is not whole, and the words of the table.
        assert made.kernel.stores.get(16, 0) == wide, made.of.name
    check_rows(found)


# --- The list and the table -------------------------------------------------------------------------------------------

def test_the_list_is_the_one_that_is_committed():
    assert list(cases.listed()) == cases.covering(), "make proof"


def test_the_list_covers_every_pair():
    found = cases.listed()
    assert {(case.rule, case.storage) for case in found} >= set(product(cases.BY_NAME, cases.PLAIN))
    assert {(case.storage, case.arch) for case in found} == set(product((*cases.PLAIN, *cases.KEPT),
                                                                         cases.ARCHITECTURES))
    assert {(case.rule, case.arch) for case in found} == set(product(cases.BY_NAME, cases.ARCHITECTURES))
    others = [case for case in found if not case.plain]
    assert {(case.storage, case.layout) for case in others} == set(product(cases.KEPT, cases.LAYOUTS))
    assert {(case.layout, case.arch) for case in others} == set(product(cases.LAYOUTS, cases.ARCHITECTURES))
    assert {case.rule for case in others} == set(cases.BY_NAME)


def test_the_table_has_every_kernel():
    assert table.missing("triton", set(listed.listed())) == set(), "make proof"


def test_ceilings():
    """Of everything that is committed. An H200 executes 7.6 instructions while its memory delivers a byte
    (tests/test_disassembly.py): steps of plain items and those with fp32 states take far fewer. Codes take more.
    """
    for name, row in table.newest("triton")[1].items():
        assert row["occupancy"] >= 0.125, name
        if name.startswith("step "):
            case = cases.Case.parse(name)
            assert row["per_element"] / row["bytes"] <= PER_BYTE[case.plain or case.storage.endswith(" f32")], name
        assert not row["local"] or may_spill(cases.Case.parse(name)), name


def test_page():
    page = command.DOCS / "triton-kernels.md"
    assert page.read_text() == triton_page.page(*table.newest("triton")), "make proof"


# --- The code ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch", cases.ARCHITECTURES)
def test_machine_code_is_what_the_disassembler_shows(arch):
    """As tests/test_disassembly.py has it of nvcc's code."""
    case = cases.Case("AdamW", "split16, f32, int4", "clip and EMA", arch)
    cubin = compile_kept_ahead(cases.BY_NAME[case.rule], case.codecs, True, arch).asm["cubin"]
    (kernel,), text = disassembly.read(cubin), disassembly.listing(cubin)
    assert (kernel.loads, kernel.stores) == (disassembly.widths("LDG", text), disassembly.widths("STG", text))
    assert (kernel.local, kernel.fused) == tuple(len(re.findall(rf"\b({names})\b", text))
                                                 for names in ("LDL|STL", "FFMA|DFMA"))
    assert len(kernel.code) == len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", text, re.MULTILINE))


def test_a_norm_reads_before_it_adds():
    """Sixteen loads are in flight in each thread: no sum stands between them."""
    compiled = triton_sums.compile_ahead("square", 0, 90)
    code = disassembly.listing(compiled.asm["cubin"])
    first = code.index("LDG.E.128")
    assert code[first : code.index("DFMA", first)].count("LDG.E.128") == 16


def test_kept_items_are_not_contracted():
    """Rules without division or root, in codecs that have none."""
    case = cases.Case("SGDMomentum", "split16, bf16, f32", "clip", 90)
    assert "fma" not in compile_kept_ahead(cases.BY_NAME[case.rule], case.codecs, True, 90).asm["ptx"]
