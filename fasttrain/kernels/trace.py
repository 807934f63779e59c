"""Trace a rule: run its `element` once on symbols, and keep what it did as a graph.

The graph is what the C++ and Triton emitters print, and what benchmarks and documents count flops and bytes from.
"""

from __future__ import annotations

import linecache
import math
import sys
from dataclasses import dataclass, field
from functools import cache
from types import FrameType
from typing import Any

from fasttrain import rule as vocabulary
from fasttrain.rule import Operand, Rule, RuleError

ARITHMETIC = ("add", "sub", "mul", "div", "neg", "sqrt")
TRACERS = (__name__, vocabulary.__name__)  # modules, by how their names begin: trace_scalars as well
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
LOGIC = ("and", "or", "not")


# Names that mean something else in the code that is printed: keywords of C++, and the emitters' own.
KEYWORDS = frozenset("""
    alignas alignof and and_eq asm auto bitand bitor bool break case catch char class compl concept const const_cast
    consteval constexpr constinit continue co_await co_return co_yield decltype default delete do double dynamic_cast
    else enum explicit export extern false float for friend goto if inline int long mutable namespace new noexcept not
    not_eq nullptr operator or or_eq private protected public register reinterpret_cast requires return short signed
    sizeof static static_assert static_cast struct switch template this thread_local throw true try typedef typeid
    typename union unsigned using virtual void volatile wchar_t while xor xor_eq T
""".split())
RESERVED = KEYWORDS | frozenset("""
    p g k K row states coefficients digest element square_root absolute
    tl jit load store divide without_denormal wide block table rows width chunk offsets keep count scale interpreted
    fetch put clip clipped limit ema flags index inside zeros full_index random_bits
""".split())


class Symbol(Operand):
    """A node of the graph: an input, a coefficient, a constant, or an operation on other nodes."""

    __slots__ = ("arguments", "graph", "kind", "op", "value")

    def __init__(self, graph: Graph, kind: str, op: str, arguments: tuple[Symbol, ...] = (), value: Any = None):
        self.graph, self.kind, self.op, self.arguments, self.value = graph, kind, op, arguments, value

    __hash__ = object.__hash__  # type: ignore[assignment]

    def apply(self, op: str, *arguments: Any) -> Symbol:
        return self.graph.record(op, arguments)

    def refuse(self, what: str, remedy: str) -> RuleError:
        return RuleError(f"{written()}: {what} is outside the vocabulary of a rule: {remedy}")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        try:
            return super().__torch_function__(func, types, args, kwargs)
        except RuleError as error:
            raise RuleError(f"{written()}: {error}") from None


@dataclass(eq=False)
class Graph:
    """What one element costs and how it is computed.

    Attributes:
        rule: the rule that was traced.
        inputs: the nodes ``p, g, *state``.
        outputs: the nodes of the new ``p, *state``.
        coefficients: names of the coefficients that are used, in the order of the coefficient row.
        nodes: every operation in the order in which it was recorded, each once.
        names: the author's own names for intermediate values.
    """

    rule: Rule
    inputs: list[Symbol] = field(default_factory=list)
    outputs: list[Symbol] = field(default_factory=list)
    coefficients: list[str] = field(default_factory=list)
    nodes: list[Symbol] = field(default_factory=list)
    names: dict[Symbol, str] = field(default_factory=dict)
    _known: dict[Any, Symbol] = field(default_factory=dict)

    def record(self, op: str, arguments: tuple[Any, ...]) -> Symbol:
        nodes = tuple(self._symbol(argument) for argument in arguments)
        scalars = [node for node in nodes if node.kind in ("coefficient", "constant")]
        if len(scalars) == len(nodes) and op not in COMPARISONS:
            spelled = ", ".join(f"k.{n.op}" if n.kind == "coefficient" else str(n.value) for n in scalars)
            raise RuleError(f"{written()}: '{op}' combines scalars only ({spelled}): they would be rounded before they "
                            "are combined. Compute the result in coefficients() and use it as one coefficient")
        kind = "condition" if op in COMPARISONS + LOGIC else "value"
        for position, node in enumerate(nodes):
            if (node.kind == "condition") != (op in LOGIC or (op == "where" and position == 0)):
                raise RuleError(f"{written()}: '{op}' takes {'a value' if node.kind == 'condition' else 'a comparison'}"
                                " there: a comparison selects, in where(), and joins others with & | ~")
        return self._unique((op, *map(id, nodes)), kind, op, nodes)

    def _symbol(self, value: Any) -> Symbol:
        if isinstance(value, Symbol):
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise RuleError(f"{written()}: {type(value).__name__} is not a value of a rule: use p, g, the states, "
                            "coefficients, and float constants")
        if not math.isfinite(value):
            raise RuleError(f"{written()}: the constant {value} is outside the vocabulary of a rule: constants are "
                            "finite")
        return self._unique(("constant", repr(float(value))), "constant", "constant", (), float(value))

    def _unique(self, key: Any, kind: str, op: str, arguments: tuple[Symbol, ...] = (), value: Any = None) -> Symbol:
        if key not in self._known:
            self._known[key] = Symbol(self, kind, op, arguments, value)
            if arguments:
                self.nodes.append(self._known[key])
        return self._known[key]

    def coefficient(self, name: str) -> Symbol:
        if name in KEYWORDS:
            raise RuleError(f"{written()}: a coefficient cannot be called {name!r}, a word of C++: choose another name")
        if name not in self.coefficients:
            self.coefficients.append(name)
        return self._unique(("coefficient", name), "coefficient", name)

    def row(self, step: int, group: Any) -> list[float]:
        """The coefficients of one step count and parameter group, in the order of `coefficients`, as doubles."""
        scalars = self.rule.scalars(step, group)
        try:
            return [float(scalars[name]) for name in self.coefficients]
        except KeyError as missing:
            raise RuleError(f"rule {self.rule.name}: element() uses k.{missing.args[0]}, which coefficients() does not "
                            f"return (it returns {', '.join(scalars)})") from None

    @property
    def live(self) -> list[Symbol]:
        """The operations that the outputs need, in order."""
        needed: set[int] = set()
        stack = list(self.outputs)
        while stack:
            node = stack.pop()
            if id(node) not in needed:
                needed.add(id(node))
                stack.extend(node.arguments)
        return [node for node in self.nodes if id(node) in needed]

    @property
    def changed(self) -> list[bool]:
        """Of p and the states: whether the rule changes it. A stage writes no other; other rules write them all."""
        kept = [self.inputs[0], *self.inputs[2:]]
        return [old is not new for old, new in zip(kept, self.outputs[: len(kept)], strict=True)]

    @property
    def flops(self) -> int:
        """Floating-point operations per element (``+ - * /``, negation, square root), the gradient's scale included."""
        return 1 + sum(node.op in ARITHMETIC for node in self.live)

    @property
    def uses(self) -> dict[str, int]:
        """How often each operation occurs per element."""
        count: dict[str, int] = {}
        for node in self.live:
            count[node.op] = count.get(node.op, 0) + 1
        return count

    def bytes_per_element(self, param: int, grad: int, state: int | tuple[int, ...]) -> int:
        """Bytes that a step must move per element, given the bytes per element of each tensor.

        >>> from fasttrain.optim import AdamW
        >>> trace(AdamW.rules[0]).bytes_per_element(4, 4, 4)
        28
        """
        states = (state,) * len(self.rule.state) if isinstance(state, int) else state
        return param + grad + sum(states) + sum(size for size, moved in zip((param, *states), self.changed, strict=True)
                                                if moved or self.rule.sums is None)


class _Coefficients:
    """What `element` receives as k: each attribute is a scalar of the graph."""

    def __init__(self, graph: Graph):
        self._graph = graph

    def __getattr__(self, name: str) -> Symbol:
        return self._graph.coefficient(name)


def written() -> str:
    """File, line and text of the author's line: the innermost frame outside the vocabulary and the tracers."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith((*TRACERS, "numpy")):
        frame = frame.f_back
    if frame is None:
        return "a rule"
    file, line = frame.f_code.co_filename, frame.f_lineno
    return f"{file}:{line}: {linecache.getline(file, line).strip()}".rstrip(": ")


@cache
def trace(rule: Rule) -> Graph:
    """The graph of a rule.

    Raises:
        RuleError: the equation leaves the vocabulary; the message names the line and the remedy.
    """
    own = (*rule.state, *(rule.sums or ()))
    for name in own:
        if not name.isidentifier() or name in RESERVED or own.count(name) > 1:
            raise RuleError(f"rule {rule.name}: a state cannot be called {name!r}, which the generated code uses for "
                            "something else: choose another name")
    graph = Graph(rule)
    graph.inputs = [graph._unique(("input", name), "input", name) for name in ("p", "g", *rule.state)]

    def remember_names(frame: FrameType, event: str, result: Any) -> None:
        if event == "return" and frame.f_code.co_filename not in (__file__, vocabulary.__file__):
            for name, value in frame.f_locals.items():
                if isinstance(value, Symbol) and value.arguments:
                    graph.names.setdefault(value, name)

    before = sys.getprofile()
    sys.setprofile(remember_names)
    try:
        outputs = rule.element(*graph.inputs, _Coefficients(graph))
    finally:
        sys.setprofile(before)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    expected = 1 + len(own)
    if len(outputs) != expected or not all(isinstance(o, Symbol) and o.kind in ("value", "input") for o in outputs):
        raise RuleError(f"rule {rule.name}: element() must return {expected} values, the new p"
                        + "".join(f", {name}" for name in own) + f"; it returned {outputs!r}")
    graph.outputs = list(outputs)
    return graph


def statements(graph: Graph) -> tuple[list[tuple[str, Symbol]], dict[Symbol, str]]:
    """What an emitter prints: (name, node) in order for each value that gets a name, and the name of every leaf.

    A value gets a name if the author gave it one or if it is used more than once; the rest is printed inside the
    expression that uses it.
    """
    uses: dict[Symbol, int] = {}
    for node in graph.live:
        for argument in node.arguments:
            uses[argument] = uses.get(argument, 0) + 1
    for output in graph.outputs:
        uses[output] = uses.get(output, 0) + 1
    taken = {node.op for node in graph.inputs} | {f"new_{node.op}" for node in graph.inputs} | set(graph.coefficients)
    taken |= RESERVED | set(graph.rule.sums or ())
    named: list[tuple[str, Symbol]] = []
    for node in graph.live:
        if node not in graph.names and uses[node] < 2:
            continue
        stem = graph.names.get(node, "t")
        name, number = (stem, 1) if stem not in taken and stem != "t" else (f"{stem}1", 1)
        while name in taken:
            number += 1
            name = f"{stem}{number}"
        taken.add(name)
        named.append((name, node))
    leaves = {node: node.op for node in graph.inputs}
    return named, leaves
