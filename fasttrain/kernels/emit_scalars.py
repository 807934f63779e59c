"""Print a traced `coefficients` as Triton. CUDA runs it as a program (`fasttrain.kernels.program`)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator

from fasttrain.kernels.emit_cpp import INFIX
from fasttrain.kernels.program import program
from fasttrain.kernels.trace_scalars import Scalar, ScalarGraph

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


def digest(graph: ScalarGraph) -> int:
    """32 bits that tell one computation of coefficients from another."""
    return zlib.crc32(program(graph).words.tobytes())


def name_of(graph: ScalarGraph) -> str:
    """What a computation is called: the rule's name, and the digest."""
    return f"{graph.name.removeprefix('rule ')}_{digest(graph):08X}"


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
