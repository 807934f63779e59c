"""What machine code does, read from its bits: accesses by width, branches, and the shortest way through.

NVIDIA documents no encoding. What is read here of the 16 bytes of an instruction is what its disassembler shows of the
same bits, and a test compares the two on every kernel of the package. The disassembler takes 0.2 s for a kernel, which
is what Triton takes to compile it; this takes a millisecond.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np

# Operations, by bits 0 to 11; the same in sm_80, sm_90 and sm_100.
LOAD, STORE = 0x981, 0x986  # global
LOCAL = (0x983, 0x387)  # load, store
FUSED = (0x223, 0x423, 0x823, 0x22B, 0x42B, 0x82B)  # FFMA and DFMA, by where their operands are
BRANCH, BRANCH_UNIFORM, EXIT, RETURN, CALL = 0x947, 0x547, 0x94D, 0x950, 0x944
WIDTHS = (1, 1, 2, 2, 4, 8, 16)  # of an access, by bits 73 to 75: U8, S8, U16, S16, 32, 64, 128
WIDE = 16
ALWAYS = 7  # the predicate that is true


@dataclass(frozen=True)
class Code:
    """The instructions of a kernel, its subroutines included: uint64 of shape (instructions, 2), low bits first."""

    words: np.ndarray
    arch: int

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def operations(self) -> np.ndarray:
        return (self.words[:, 0] & np.uint64(0xFFF)).astype(np.int64)

    @cached_property
    def widths(self) -> np.ndarray:
        """Bytes of an access, if an instruction is one."""
        return np.array([*WIDTHS, 0])[(self.words[:, 1] >> np.uint64(9)).astype(np.int64) & 7]

    def count(self, *operations: int) -> int:
        """How many instructions are of one of the operations."""
        return int(np.isin(self.operations, operations).sum())

    def accesses(self, operation: int, among: np.ndarray | None = None) -> dict[int, int]:
        """How often each width in bytes occurs, in the whole code or among some instructions."""
        chosen = np.arange(len(self)) if among is None else among
        return dict(sorted(Counter(self.widths[chosen][self.operations[chosen] == operation].tolist()).items()))

    @cached_property
    def predicated(self) -> list[bool]:
        """Whether something decides if an instruction is executed, or a branch taken."""
        low, high = self.words[:, 0].astype(np.int64), self.words[:, 1].astype(np.int64)
        branch = self.operations == BRANCH
        found = (low >> 12 & 0xF != ALWAYS) | (branch & (high >> 23 & 0x1F != ALWAYS))
        return (found | (self.operations == BRANCH_UNIFORM)).tolist()

    @cached_property
    def targets(self) -> list[int | None]:
        """The index of the instruction to which a branch goes."""
        found: list[int | None] = [None] * len(self)
        for index in np.flatnonzero(np.isin(self.operations, (BRANCH, BRANCH_UNIFORM))).tolist():
            low, high = map(int, self.words[index])
            distance, bits = (low | high << 64) >> 34 & (1 << 48) - 1, 48
            if self.arch >= 90:
                distance, bits = distance << 8 | low >> 16 & 0xFF, 56
            distance -= distance >> bits - 1 << bits  # in words of four bytes from the next instruction on
            found[index] = index + 1 + distance // 4
        return found

    @cached_property
    def way(self) -> np.ndarray:
        """The way through the kernel, every loop gone through once."""
        return self.between(0, len(self))

    @cached_property
    def round(self) -> np.ndarray:
        """The way through the loop in which most 16-byte accesses are made, the innermost of such; empty without one.
        """
        found, most = np.array([], np.int64), 0
        for last in range(len(self)):
            first = self.targets[last]
            if first is not None and first < last and 0 < int(self.wide[first : last + 1].sum()) >= most:
                way = self.between(first, last)
                count = int(self.wide[way].sum())
                if (count, -len(way)) > (most, -len(found)):
                    found, most = way, count
        return found

    @cached_property
    def wide(self) -> np.ndarray:
        """Whether an instruction is a global access of 16 bytes."""
        return np.isin(self.operations, (LOAD, STORE)) & (self.widths == WIDE)

    def between(self, first: int, last: int) -> np.ndarray:
        """The instructions from `first` to `last` on the way that makes most 16-byte accesses; of such ways one of
        fewest calls, and of these the shortest. It is the aligned path, without what rare values take.
        """
        best: dict[int, tuple[int, int, int]] = {last: (0, 0, 0)}  # accesses, calls and instructions from here on
        after: dict[int, int] = {}
        for index in reversed(range(first, last)):
            followers = [there for there in self.followers(index) if index < there and there in best]
            if followers:
                after[index] = next_one = max(followers, key=lambda there: (best[there], -there))
                accesses, calls, length = best[next_one]
                best[index] = (accesses + int(self.wide[index]), calls - int(self.operations[index] == CALL),
                               length - 1)
        if first not in after:
            return np.array([], np.int64)
        found, index = [first], first
        while index != last:
            index = after[index]
            found.append(index)
        return np.array(found[: len(found) - (last == len(self))])

    def followers(self, index: int) -> list[int]:
        """What may be executed next; at the end of a loop, what follows where the loop is left."""
        target, certain = self.targets[index], not self.predicated[index]
        if target is not None and target <= index and certain:
            return [there for at in range(target, index) if (there := self.targets[at]) is not None and there > index]
        if certain and (target is not None or self.operations[index] in (EXIT, RETURN)):
            return [len(self)] if target is None else [target]
        return [index + 1] if target is None else [index + 1, target]


def sections(cubin: bytes) -> dict[str, bytes]:
    """The sections of a 64-bit ELF file, by name."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + size * i) for i in range(count)]
    first = headers[names][4]
    return {cubin[first + name : cubin.index(b"\0", first + name)].decode(): cubin[offset : offset + length]
            for name, _, _, _, offset, length in headers}


def kernels(cubin: bytes) -> dict[str, Code]:
    """The code of every kernel of a cubin."""
    (flags,) = struct.unpack_from("<I", cubin, 48)
    arch = flags >> 8 & 0xFF if cubin[8] >= 8 else flags & 0xFF  # cubin[8]: of the file's form
    return {name.removeprefix(".text."): Code(np.frombuffer(text, "<u8").reshape(-1, 2), arch)
            for name, text in sections(cubin).items() if name.startswith(".text.")}
