"""Print a traced `coefficients` as C++ that g++, nvcc and NVRTC read alike, and as Triton."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator

from fasttrain.kernels.emit_cpp import INFIX
from fasttrain.kernels.trace_scalars import Scalar, ScalarGraph

HEADER = """\
// GENERATED from fasttrain.optim by `make rules`. Do not edit: change `coefficients` and generate again.
//
// One struct for each rule and choice of its options: the coefficients of one row, in the order of the rule, from the
// numbers that the comment names. Every operation is one IEEE operation in double precision.
#pragma once
#include "cuda/scalars.cuh"

namespace fasttrain {
inline namespace FT_ISA {
"""
FOOTER = """\
}  // namespace FT_ISA
}  // namespace fasttrain

#define FASTTRAIN_COEFFICIENTS(X)"""
CALLS = {"sqrt": "square_root", "abs": "absolute", "log": "logarithm", "power": "power",
         "integer_power": "integer_power"}


def input_names(graph: ScalarGraph) -> list[str]:
    """What the inputs are called in the code."""
    return [f"h_{name}" for name in graph.names]


def statements(graph: ScalarGraph) -> list[tuple[str, Scalar]]:
    """(name, node) in order, for each value that is used more than once; the rest is printed where it is used."""
    uses: dict[Scalar, int] = {}
    for node in (*(argument for user in graph.live for argument in user.arguments), *graph.outputs.values()):
        uses[node] = uses.get(node, 0) + 1
    often = [node for node in graph.live if uses[node] > 1 and node.op != "count"]
    return [(f"t{number + 1}", node) for number, node in enumerate(often)]


def used_inputs(graph: ScalarGraph) -> list[tuple[int, str]]:
    """Place and name of each input that the outputs need."""
    needed = {argument for node in graph.live for argument in node.arguments} | set(graph.outputs.values())
    return [(place, name) for place, (node, name) in enumerate(zip(graph.inputs, input_names(graph), strict=True))
            if node in needed]


class Printer:
    """Prints expressions; `spell` says how an operation is spelled whose arguments are printed already."""

    def __init__(self, graph: ScalarGraph, spell: Callable[[Scalar, list[str]], str]):
        self.spell = spell
        self.names = dict(zip(graph.inputs, input_names(graph), strict=True))

    def __call__(self, node: Scalar) -> str:
        while node.op == "count":
            node = node.arguments[0]
        return self.names.get(node) or self.spell(node, [self(argument) for argument in node.arguments])

    def named(self, graph: ScalarGraph) -> Iterator[tuple[str, Scalar, str]]:
        for name, node in statements(graph):
            text = self(node)
            self.names[node] = name
            yield name, node, text


# --- C++ --------------------------------------------------------------------------------------------------------------

def _cpp(node: Scalar, parts: list[str]) -> str:
    if node.op == "constant":
        if not math.isfinite(node.value):
            return "not_a_number()" if math.isnan(node.value) else f"({'-' * (node.value < 0)}infinity())"
        return repr(node.value) if math.copysign(1.0, node.value) > 0 else f"({node.value!r})"
    if node.op in CALLS:
        return f"{CALLS[node.op]}({', '.join(parts)})"
    if node.op == "where":
        return f"({parts[0]} ? {parts[1]} : {parts[2]})"
    if node.op in ("neg", "not"):
        return f"({'-' if node.op == 'neg' else '!'}{parts[0]})"
    return f"({parts[0]} {INFIX[node.op]} {parts[1]})"


def _inner(graph: ScalarGraph) -> Iterator[str]:
    yield f"  static constexpr int inputs = {len(graph.inputs)}, coefficients = {len(graph.outputs)};"
    yield "  template <class T, class Numbers>"
    used = used_inputs(graph)
    yield (f"  HOST_DEVICE static void row({'' if used else '[[maybe_unused]] '}const Numbers& numbers, "
           f"{'' if graph.outputs else '[[maybe_unused]] '}T* k) {{")
    for place, name in used:
        yield f"    const double {name} = numbers[{place}];"
    text = Printer(graph, _cpp)
    for name, node, value in text.named(graph):
        yield f"    const {'bool' if node.condition else 'double'} {name} = {value};"
    for place, node in enumerate(graph.outputs.values()):
        yield f"    k[{place}] = static_cast<T>({text(node)});"
    yield "  }"


def digest(graph: ScalarGraph) -> int:
    """32 bits that tell one computation of coefficients from another."""
    return zlib.crc32("\n".join(_inner(graph)).encode())


def name_of(graph: ScalarGraph) -> str:
    """What the struct is called: the rule's name, and the digest."""
    return f"{graph.name.removeprefix('rule ')}_{digest(graph):08X}"


def struct(graph: ScalarGraph) -> str:
    """The C++ of one graph."""
    chosen = [f"{name}={kind[1]!r}" for name, kind in graph.structure if kind[0] == "is"]
    comment = f"// {graph.name}: {', '.join(graph.names)}{''.join(f'; {one}' for one in chosen)}"
    return "\n".join([comment, f"struct {name_of(graph)} {{", *_inner(graph), "};"]) + "\n"


def header(graphs: Iterable[ScalarGraph]) -> str:
    """The whole text of `csrc/cuda/coefficients.cuh`."""
    graphs = list(graphs)
    body = "\n".join(struct(graph) for graph in graphs)
    return f"{HEADER}\n{body}\n{FOOTER}" + "".join(f" \\\n  X({name_of(graph)})" for graph in graphs) + "\n"


# --- Triton -----------------------------------------------------------------------------------------------------------

def _triton(node: Scalar, parts: list[str]) -> str:
    if node.op == "constant":
        # A literal would be rounded to fp32; Triton 3.6 loses the sign of a constant zero.
        value = f"float({str(abs(node.value))!r})" if not math.isfinite(node.value) else repr(abs(node.value))
        text = f"tl.full((), {value}, tl.float64)"
        return text if math.copysign(1.0, node.value) > 0 else f"({text} * -1.0)"
    match node.op:
        case "sqrt":
            return f"tl.sqrt({parts[0]})"  # of fp64 it is correctly rounded
        case "abs":
            return f"tl.abs({parts[0]})"
        case "where":
            return f"tl.where({', '.join(parts)})"
        case "not":
            return f"({parts[0]} == 0)"
        case "neg":  # Triton's own minus is 0 - x, which loses the sign of zero
            return f"({parts[0]} * -1.0)"
        case "log" | "power" | "integer_power":
            return f"{CALLS[node.op]}({', '.join(parts)})"
    return f"({parts[0]} {INFIX[node.op]} {parts[1]})"


def triton_kernel(graph: ScalarGraph, fixed: tuple[str, ...]) -> str:
    """The source of `prologue`, one program for `block` rows (`fasttrain.kernels.prologue`).

    Arguments:
        fixed: the numbers of a row before the inputs of the graph.
    """
    return "\n".join(_triton_lines(graph, fixed)) + "\n"


def _triton_lines(graph: ScalarGraph, fixed: tuple[str, ...]) -> Iterator[str]:
    width = 1 + len(graph.outputs)
    yield "@jit"
    yield "def prologue(words, rows, out, skip, kept: tl.constexpr, block: tl.constexpr):"
    yield "    row = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)"
    yield "    row = tl.where(row < rows, row, rows - 1)  # several make the last one"
    yield f"    words += row * {3 * (len(fixed) + len(graph.inputs))}"
    yield f"    out += row * ({width} + (3 if kept else 0))"
    for place, name in enumerate(fixed):
        yield f"    {name} = number(words + {3 * place})"
    for place, name in used_inputs(graph):
        yield f"    {name} = number(words + {3 * (len(fixed) + place)})"
    yield "    tl.store(skip + row, (found != 0).to(tl.int32))"
    yield "    total = total_scale(scale, grad_scale, norm, max_norm, square, max_each)"
    yield "    tl.store(out, total.to(out.dtype.element_ty))"
    text = Printer(graph, _triton)
    for name, _, value in text.named(graph):
        yield f"    {name} = {value}"
    for place, node in enumerate(graph.outputs.values()):
        value = text(node)
        yield f"    k = {value} + 0.0 * row" if node.op == "constant" else f"    k = {value}"
        yield f"    tl.store(out + {1 + place}, k.to(out.dtype.element_ty))"
    yield "    if kept:"
    yield f"        tl.store(out + {width}, clip_value.to(out.dtype.element_ty))"
    yield f"        tl.store(out + {width + 1}, ema_decay.to(out.dtype.element_ty))"
    yield f"        tl.store(out + {width + 2}, (1.0 - ema_decay).to(out.dtype.element_ty))"
