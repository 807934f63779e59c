"""Print a traced `coefficients` as a program for the prologue's kernel (csrc/cuda/prologue.cuh).

A word of 64 bits is an instruction: the operation, a slot for its result, and slots of at most three arguments. A slot
is used again once nothing reads it any more, so that a program of a hundred instructions needs about twenty.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np

from fasttrain.kernels.trace_scalars import Scalar, ScalarGraph

# As `Operation` in csrc/cuda/prologue.cuh.
OPERATIONS = ("constant", "input", "output", "add", "sub", "mul", "div", "neg", "sqrt", "abs", "log", "power",
              "integer_power", "where", "lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not")
SLOTS = 1 << 14


class Program(NamedTuple):
    """Words for the device, and what it needs.

    Attributes:
        words: int64: their number, the number of coefficients, then instructions and constants.
        slots: doubles in which it computes.
    """

    words: np.ndarray
    slots: int


@cache
def program(graph: ScalarGraph) -> Program:
    """The program of a graph.

    Raises:
        ValueError: it holds more numbers at a time than an instruction can name.

    Example:
        >>> from fasttrain.optim import SGD
        >>> from fasttrain.kernels.trace_scalars import trace_scalars
        >>> group = dict(lr=0.5, momentum=0.0, dampening=0.0, weight_decay=0.0)
        >>> made = program(trace_scalars(SGD.rules[0], group))
        >>> [OPERATIONS[word & 255] for word in made.words[2:].tolist()], made.slots
        (['input', 'output'], 1)
    """
    steps = list(_steps(graph))
    last = {node: index for index, (_, arguments, _) in enumerate(steps) for node in arguments}
    slot_of: dict[Scalar, int] = {}
    free: list[int] = []
    words: list[int] = []
    slots = 0
    for index, (node, arguments, place) in enumerate(steps):
        given = [slot_of[argument] for argument in arguments]
        free += sorted({slot_of[argument] for argument in arguments if last[argument] == index}, reverse=True)
        if node is None:
            words.append(_word("output", 0, given, place))
            continue
        if not free:
            free.append(slots)
            slots += 1
        slot_of[node] = free.pop()
        words.append(_word(node.op, slot_of[node], given, place))
        if node.op == "constant":
            words.append(int(np.float64(node.value).view(np.int64)))
    if max(slots, len(graph.inputs), len(graph.outputs)) > SLOTS:
        raise ValueError(f"{graph.name}: {len(graph.inputs)} numbers, {len(graph.outputs)} coefficients and {slots} at "
                         f"a time are more than the {SLOTS} that a device computes with")
    return Program(np.array([2 + len(words), len(graph.outputs), *words], np.int64), slots)


def _word(op: str, to: int, arguments: list[int], place: int) -> int:
    fields = [to, *arguments, 0, 0, 0][:4]
    if op in ("input", "output"):
        fields[3] = place
    bits = sum(field << (8 + 14 * i) for i, field in enumerate(fields)) | OPERATIONS.index(op)
    return bits - (1 << 64) if bits >> 63 else bits


def _steps(graph: ScalarGraph) -> Iterator[tuple[Scalar | None, list[Scalar], int]]:
    """(node, or None for an output; arguments; place of an input or output), each after what it needs."""
    places = {node: place for place, node in enumerate(graph.inputs)}
    known: set[Scalar] = set()

    def needed(node: Scalar) -> Iterator[tuple[Scalar, list[Scalar], int]]:
        if node not in known:
            known.add(node)
            yield node, [_counted(argument) for argument in node.arguments], places.get(node, 0)

    for node in graph.live:
        if node.op != "count":
            for argument in map(_counted, node.arguments):
                yield from needed(argument)
            yield from needed(node)
    for place, node in enumerate(map(_counted, graph.outputs.values())):
        yield from needed(node)
        yield None, [node], place


def _counted(node: Scalar) -> Scalar:
    while node.op == "count":
        node = node.arguments[0]
    return node


class Addresses(NamedTuple):
    """Of a program, and of the first of the words, rows and flags of rows that it makes."""

    program: int
    words: int
    rows: int
    skip: int


def described(at: Addresses, rows: int, numbers: int, width: int, wide: bool, kept: bool) -> np.ndarray:
    """What the prologue's kernel is told of rows of one program, as int64 of shape (rows, 6). The last column but one,
    of slots, is that of all rows of a launch together (`with_slots`).

    Arguments:
        numbers: of a row, each of three words.
        width: numbers of a row that is made (`fasttrain.kernels.prologue.width`).
        wide: rows are float64.
        kept: they end with a tail.
    """
    index = np.arange(rows)
    made = np.zeros((rows, 6), np.int64)
    made[:, 0] = at.program
    made[:, 1] = at.words + index * 24 * numbers
    made[:, 2] = at.rows + index * (8 if wide else 4) * width
    made[:, 3] = at.skip + index * 4
    made[:, 5] = wide + 2 * kept
    return made


def with_slots(table: np.ndarray, at: int) -> np.ndarray:
    """The table of a launch, whose slots begin at an address: 8 bytes for each row and slot."""
    table[:, 4] = at + 8 * np.arange(len(table))
    return table
