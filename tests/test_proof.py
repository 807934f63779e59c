"""The parts of the proof without a GPU, one by one: the covering list, machine code, occupancy, the table."""

import doctest
from itertools import combinations, product

import numpy as np
import pytest

from benchmarks.proof import __main__ as command
from benchmarks.proof import covering, machine_code, occupancy, table, traffic

LOAD, BRANCH, CALL, EXIT, OTHER = machine_code.LOAD, machine_code.BRANCH, machine_code.CALL, machine_code.EXIT, 0x918
ROW = {"registers": 64, "loads": {"16": 8}}


@pytest.mark.parametrize("module", [covering, occupancy, traffic], ids=lambda module: module.__name__)
def test_examples(module):
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed


# --- A list with every pair -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sizes", [(2, 2), (3, 3, 3), (7, 2, 5), (32, 7, 1, 3)], ids=str)
def test_every_pair_occurs(sizes):
    factors = {f"factor {i}": [(i, value) for value in range(size)] for i, size in enumerate(sizes)}
    found = covering.cover(factors)
    for one, other in combinations(factors, 2):
        assert {(case[one], case[other]) for case in found} == set(product(factors[one], factors[other]))
    largest = sorted(sizes)[-2:]
    assert largest[0] * largest[1] <= len(found) <= 1.5 * largest[0] * largest[1]
    assert found == covering.cover(factors)


def test_what_cannot_be_does_not_occur():
    def allowed(case):
        return not (case.get("storage") == "plain" and case.get("layout") == "clip")

    factors = {"storage": ["plain", "split"], "layout": ["", "clip"], "arch": [80, 90, 100]}
    found = covering.cover(factors, None, allowed)
    assert all(map(allowed, found))
    assert {(case["storage"], case["layout"]) for case in found} == {("plain", ""), ("split", ""), ("split", "clip")}


# --- Machine code -----------------------------------------------------------------------------------------------------

def instruction(operation: int, to: int = 0, predicate: int = machine_code.ALWAYS, width: int = 0) -> list[int]:
    """In the bits of sm_90; `to`: instructions from the next one on to where a branch goes."""
    distance = to * 4 & (1 << 56) - 1  # in words of four bytes
    low = operation | predicate << 12 | (distance & 0xFF) << 16 | (distance >> 8) << 34
    return [low & (1 << 64) - 1, width << 9 | machine_code.ALWAYS << 23 | low >> 64]


def code(*instructions: list[int]) -> machine_code.Code:
    return machine_code.Code(np.array(instructions, np.uint64), 90)


def test_a_way_through_a_loop():
    """Once, and around a call that rare values take."""
    found = code(instruction(OTHER), instruction(LOAD, width=6), instruction(BRANCH, 1, predicate=0), instruction(CALL),
                 instruction(BRANCH, -4, predicate=1), instruction(LOAD, width=4), instruction(EXIT))
    assert found.targets == [None, None, 4, None, 1, None, None]
    assert found.predicated == [False, False, True, False, True, False, False]
    assert found.accesses(LOAD) == {4: 1, 16: 1}
    assert found.way.tolist() == [0, 1, 2, 4, 5, 6]
    assert found.round.tolist() == [1, 2, 4]


def test_the_way_is_the_one_with_wide_accesses():
    """Though the other is shorter; a call is taken if there is no way around it."""
    found = code(instruction(BRANCH, 4, predicate=0), instruction(LOAD, width=6), instruction(CALL),
                 instruction(LOAD, width=6), instruction(EXIT), instruction(LOAD, width=4), instruction(EXIT))
    assert found.way.tolist() == [0, 1, 2, 3, 4]
    assert len(found.round) == 0


# --- Occupancy --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch, threads, registers, shared, blocks", [
    (90, 256, 32, 0, 8),  # all of 2,048 threads
    (90, 32, 32, 0, 32),  # blocks are 32 at most
    (80, 256, 128, 0, 2),
    (80, 256, 129, 0, 1),  # registers are given out by eights
    (90, 256, 255, 0, 1),
    (90, 128, 40, 98304, 2),  # 228 KB, one of them for the system in each block
    (80, 128, 40, 98304, 1),
])
def test_occupancy(arch, threads, registers, shared, blocks):
    """By hand from the tables of the programming guide."""
    assert occupancy.blocks(arch, threads, registers, shared) == blocks
    assert occupancy.occupancy(arch, threads, registers, shared) == blocks * threads / 2048


# --- The table --------------------------------------------------------------------------------------------------------

@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "PATH", tmp_path / "kernels.json")


def test_differences_are_named(empty):
    assert table.differences("cuda", "nvcc 1", {"a sm_90": ROW}) is None
    table.save("cuda", "nvcc 1", {"a sm_90": ROW, "b sm_90": ROW})
    table.save("triton", "triton 2", {"c": ROW})
    assert table.newest("cuda") == ("nvcc 1", {"a sm_90": ROW, "b sm_90": ROW})
    assert table.differences("cuda", "nvcc 1", {"a sm_90": ROW}) == []
    assert table.differences("cuda", "nvcc 2", {"a sm_90": ROW}) is None
    changed = {"a sm_90": {**ROW, "registers": 66}, "new sm_90": ROW}
    assert table.differences("cuda", "nvcc 1", changed) == ["a sm_90: registers was 64, is 66",
                                                            "new sm_90: not there before"]
    assert table.missing("cuda", {"a sm_90", "new sm_90"}) == {"b sm_90", "new sm_90"}


def test_other_compilers_take_the_place_of_the_last(empty):
    table.save("cuda", "nvcc 1", {"a": ROW})
    table.save("triton", "triton 2", {"c": ROW})
    table.save("cuda", "nvcc 3", {"a": ROW})
    assert table.load() == {"cuda": {"nvcc 3": {"a": ROW}}, "triton": {"triton 2": {"c": ROW}}}
    assert table.PATH.read_text().count("\n") == 8  # a kernel a line


def test_unknown_parts_are_refused(capsys):
    assert command.main(["cdua"]) == 2
    assert capsys.readouterr().err == "unknown: cdua; there are list, cuda, triton, pages\n"
