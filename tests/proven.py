"""What tests of compiled kernels share: kernels compiled once, and the comparison with what is committed."""

from functools import cache

from benchmarks.proof import table
from benchmarks.proof import triton as listed


@cache
def made(one: str) -> listed.Made:
    """A kernel of the table, by its name."""
    return listed.make(listed.listed()[one])


def spills(found: listed.Made) -> tuple[int, int]:
    """Instructions on local memory, and bytes of stack."""
    return found.kernel.local, found.kernel.stack


def check_rows(found: list[listed.Made]) -> None:
    """Nothing is otherwise than what is committed, where the compilers are the same."""
    changed = table.differences("triton", listed.compiler(), {one.of.name: one.row() for one in found})
    assert not changed, "\n".join([*changed, table.AGAIN])
