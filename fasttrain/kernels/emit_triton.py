"""Print a traced rule as a Triton kernel over a chunk table."""

from __future__ import annotations

import math
from collections.abc import Iterable

from fasttrain.kernels.table import ALIGNED
from fasttrain.kernels.trace import Graph, Symbol, statements, trace
from fasttrain.rule import Rule

INFIX = {"add": "+", "sub": "-", "mul": "*", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=",
         "and": "&", "or": "|"}


def kernel(rule: Rule) -> str:
    """The source of two functions: `element`, the arithmetic of a block, and `step`, its walk over one chunk.

    The table is that of `fasttrain.kernels.table`, but for the addresses of gradients, which are an array beside it;
    the storages of p, g and the states are compile-time constants. `skip` has a flag for each row, or is None.
    """
    return "\n".join(element(rule)) + "\n\n\n" + "\n".join(_step(rule, trace(rule))) + "\n"


def coefficient_names(graph: Graph) -> list[str]:
    """What the coefficients are called."""
    return [f"k_{name}" for name in graph.coefficients]


def _names(rule: Rule, graph: Graph) -> tuple[list[str], list[str]]:
    return ["p", "g", *rule.state], coefficient_names(graph)


def element(rule: Rule) -> Iterable[str]:
    """The lines of `element`."""
    graph = trace(rule)
    inputs, coefficients = _names(rule, graph)
    named, names = statements(graph)
    yield "@jit"
    yield f"def element({', '.join(inputs + coefficients)}, wide: tl.constexpr):"
    for name, node in named:
        yield f"    {name} = {_expression(node, names)}"
        names[node] = name
    yield "    return " + ", ".join(_expression(node, names, top=False) for node in graph.outputs)


def _step(rule: Rule, graph: Graph) -> Iterable[str]:
    inputs, coefficients = _names(rule, graph)
    storages = [f"{name}_storage: tl.constexpr" for name in inputs]
    columns = len(inputs) + 3
    yield "@jit"
    yield "def step(table, rows, width, gradients, skip,"
    yield f"         {', '.join(storages)},"
    yield "         wide: tl.constexpr, block: tl.constexpr, interpreted: tl.constexpr):"
    yield f"    chunk = table + tl.program_id(0).to(tl.int64) * {columns}"
    yield from addresses(inputs)
    yield f"    count = tl.load(chunk + {columns - 3})"
    yield f"    number = tl.load(chunk + {columns - 2})"
    yield "    if skip is not None:  # of which nothing is left to do"
    yield "        count = tl.where(tl.load(skip + number) != 0, 0, count)"
    yield "    row = rows + number * width"
    yield "    scale = tl.load(row)"
    for column, name in enumerate(coefficients):
        yield f"    {name} = tl.load(row + {column + 1})"
    yield "    offsets = tl.arange(0, block)"
    yield "    keep = offsets < count"
    yield f"    if (tl.load(chunk + {columns - 1}) == 1) & (at_g % {ALIGNED} == 0) & (count == block):"
    yield from _body(rule, inputs, coefficients, whole=True)
    yield "    else:"
    yield from _body(rule, inputs, coefficients, whole=False)


def addresses(inputs: Iterable[str]) -> Iterable[str]:
    """The lines that read where a chunk's operands begin."""
    for column, name in enumerate(inputs):
        where = "gradients + tl.program_id(0)" if name == "g" else f"chunk + {column}"
        yield f"    at_{name} = tl.load({where})"


def _body(rule: Rule, inputs: list[str], coefficients: list[str], whole: bool) -> Iterable[str]:
    indent = " " * 8
    for name in inputs:
        yield f"{indent}{name} = load(at_{name}, offsets, keep, {name}_storage, wide, {whole}, interpreted)"
    yield f"{indent}g = g * scale"
    outputs = ["p", *rule.state]
    yield f"{indent}{', '.join(outputs)} = element({', '.join(inputs + coefficients)}, wide)"
    for name, changed in zip(outputs, trace(rule).changed, strict=True):
        if rule.sums is not None and not changed:
            continue  # a stage writes only what it changes
        value = name if name == "p" else f"without_denormal({name}, wide)"
        yield f"{indent}store(at_{name}, offsets, keep, {value}, {name}_storage, {whole}, interpreted)"


def _expression(node: Symbol, names: dict[Symbol, str], top: bool = True) -> str:
    if node in names:
        return names[node]
    if node.kind == "coefficient":
        return f"k_{node.op}"
    if node.kind == "constant":
        full = f"tl.full((), {abs(node.value)!r}, tl.float64 if wide else tl.float32)"
        # Triton 3.6 loses the sign of a constant zero.
        return f"({full} * -1.0)" if math.copysign(1.0, node.value) < 0 else full
    parts = [_expression(argument, names, top=False) for argument in node.arguments]
    match node.op:
        case "div":
            return f"divide({parts[0]}, {parts[1]}, wide)"
        case "sqrt":
            return f"square_root({parts[0]}, wide)"
        case "abs":
            return f"tl.abs({parts[0]})"
        case "where":
            return f"tl.where({', '.join(parts)})"
        case "not":
            return f"(~{parts[0]})"
        case "neg":  # Triton's own minus is 0 - x, which loses the sign of zero
            text = f"{parts[0]} * -1.0"
        case op:
            text = f"{parts[0]} {INFIX[op]} {parts[1]}"
    return text if top else f"({text})"
