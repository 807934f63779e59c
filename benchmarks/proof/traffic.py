"""The bytes that a step must move for each element, by how its operands are kept."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fasttrain.kernels.trace import trace
from fasttrain.precision.codecs import NUMBER, code_dtype, codec
from fasttrain.rule import Rule


def unread(rule: Rule) -> set[int]:
    """The places of operands that a rule does not look at: compilers drop their loads."""
    graph = trace(rule)
    used = {id(argument) for node in graph.live for argument in node.arguments}
    return {place for place, operand in enumerate(graph.inputs) if id(operand) not in used}


def bytes_moved(codecs: Sequence[int], unread: Collection[int] = ()) -> float:
    """Of p, g, the states and perhaps an EMA: everything is read once and, but for the gradient, written once.

    Arguments:
        codecs: their numbers; dtypes have numbers too (`fasttrain.precision.codecs`).
        unread: places of those that are written only.

    Example:
        >>> from fasttrain.precision.codecs import NUMBER as n
        >>> bytes_moved([n["f32"]] * 4), bytes_moved([n["split16"], n["bf16"], n["int8"], n["int8"]])
        (28.0, 14.0625)
    """
    total = 0.0
    for place, number in enumerate(codecs):
        kept, written, read = codec(number), int(place != 1), int(place not in unread)
        main = 0.5 if number & 15 == NUMBER["int4"] else float(code_dtype(number).itemsize)
        total += main * (read * (not kept.name.startswith("master")) + written)  # a master's rounded copy is not read
        if kept.extra is not None:
            total += kept.extra.itemsize * (read + written) / max(kept.block, 1)
    return total
