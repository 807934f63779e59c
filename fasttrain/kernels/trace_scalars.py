"""Trace a rule's `coefficients`: run it on symbols, and keep what it did with scalars as a graph of double operations.

In a captured step nothing runs on the host, so a small kernel (`fasttrain.kernels.prologue`) computes the rows of
coefficients from the graph. What is a number in the hyperparameters becomes an input of the graph (a tuple one for each
of its numbers); None, booleans and strings select what is traced, so they are part of what a trace is made for.

A Python `if` on a symbol is followed both ways, and the results are selected from: a function is run once for each way
through it. Nothing has to be written differently for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from fasttrain import rule as vocabulary
from fasttrain.kernels.trace import trace, written
from fasttrain.rule import Operand, Rule, RuleError, maximum, minimum, where

COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
LOGIC = ("and", "or", "not")
WAYS = 256  # through the `if`s of one function, at most
WHOLE = 16  # constant exponents up to here are written out as products

Structure = tuple[tuple[str, Any], ...]  # of hyperparameters, by name: NUMBER, a tuple of these, or ("is", a value)
NUMBER = "number"


class Scalar(Operand):
    """A node of the graph: an input, a constant, or an operation on other nodes."""

    __slots__ = ("arguments", "graph", "op", "value")

    def __init__(self, graph: ScalarGraph, op: str, arguments: tuple[Scalar, ...] = (), value: Any = None):
        self.graph, self.op, self.arguments, self.value = graph, op, arguments, value

    __hash__ = object.__hash__  # type: ignore[assignment]

    @property
    def condition(self) -> bool:
        return self.op in COMPARISONS + LOGIC

    def apply(self, op: str, *arguments: Any) -> Scalar:
        return self.graph.record(op, arguments)

    def refuse(self, what: str, remedy: str) -> RuleError:
        return RuleError(f"{written()}: {what} cannot be traced for the device: {remedy}")

    def __bool__(self):
        return self.graph.decide(self if self.condition else self != 0.0)

    def __float__(self):
        raise self.refuse("a conversion to a Python number (math.*, float(), int())",
                          "use sqrt() and log() of fasttrain.rule, abs(), ** and the operators")

    __int__ = __index__ = __float__

    def __iter__(self):
        raise self.refuse("iteration over a number", "a hyperparameter that is unpacked must be a tuple")

    def log(self):
        return self.apply("log", self)

    def count(self):
        return self.apply("count", self)

    def __pow__(self, other):
        """As the host: `Step` exponents by repeated squaring, others real."""
        if isinstance(other, Scalar):
            return self.apply("integer_power" if other.op == "count" else "power", self, other)
        if other == 0.5:
            return self.apply("sqrt", self)
        if float(other).is_integer() and abs(other) <= WHOLE:
            product = self if other else self.graph.scalar(1.0)
            for _ in range(abs(int(other)) - 1):
                product = product * self
            return product if other >= 0 else 1.0 / product
        return self.apply("power", self, other)

    def __rpow__(self, other):
        return self.apply("integer_power" if self.op == "count" else "power", other, self)

    # --- NumPy's functions, which the second stages of optimizers with reductions call --------------------------------

    def __array_ufunc__(self, ufunc, method, *inputs, **keywords):
        if method != "__call__" or keywords or ufunc not in UFUNCS:
            raise self.refuse(f"np.{ufunc.__name__}", f"of NumPy there are {', '.join(NUMPY)}")
        return UFUNCS[ufunc](*(one.item() if isinstance(one, np.generic) else one for one in inputs))

    def __array_function__(self, function, types, arguments, keywords):
        if keywords or function not in FUNCTIONS:
            raise self.refuse(f"np.{function.__name__}", f"of NumPy there are {', '.join(NUMPY)}")
        return FUNCTIONS[function](*arguments)


UFUNCS: dict[Any, Callable[..., Any]] = {
    np.sqrt: vocabulary.sqrt, np.log: vocabulary.log, np.absolute: abs, np.negative: lambda a: -a,
    np.add: lambda a, b: a + b, np.subtract: lambda a, b: a - b, np.multiply: lambda a, b: a * b,
    np.true_divide: lambda a, b: a / b, np.power: lambda a, b: a**b, np.maximum: maximum, np.minimum: minimum,
    np.fmax: lambda a, b: where((a >= b) | (b != b), a, b), np.fmin: lambda a, b: where((a <= b) | (b != b), a, b),
    np.less: lambda a, b: a < b, np.less_equal: lambda a, b: a <= b, np.greater: lambda a, b: a > b,
    np.greater_equal: lambda a, b: a >= b, np.equal: lambda a, b: a == b, np.not_equal: lambda a, b: a != b,
    np.logical_and: lambda a, b: a & b, np.logical_or: lambda a, b: a | b, np.logical_not: lambda a: ~a}
FUNCTIONS: dict[Any, Callable[..., Any]] = {
    np.where: where, np.clip: lambda x, low, high: minimum(maximum(x, low), high)}
NUMPY = sorted(function.__name__ for function in (*UFUNCS, *FUNCTIONS))


@dataclass(eq=False)
class ScalarGraph:
    """What a function of scalars does.

    Attributes:
        name: of what was traced.
        structure: of the hyperparameters that it was traced for.
        inputs: the step count, then every number of the hyperparameters, in order.
        names: what the inputs are called: ``step``, ``lr``, ``betas_0``.
        outputs: the results by name.
        nodes: every operation in the order in which it was recorded, each once.
    """

    name: str
    structure: Structure = ()
    inputs: list[Scalar] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    outputs: dict[str, Scalar] = field(default_factory=dict)
    nodes: list[Scalar] = field(default_factory=list)
    _known: dict[Any, Scalar] = field(default_factory=dict)
    _path: list[bool] = field(default_factory=list)
    _decided: dict[Scalar, bool] = field(default_factory=dict)
    _ways: int = 0

    def record(self, op: str, arguments: Sequence[Any]) -> Scalar:
        nodes = tuple(map(self.scalar, arguments))
        for position, node in enumerate(nodes):
            if node.condition != (op in LOGIC or (op == "where" and position == 0)):
                raise RuleError(f"{written()}: '{op}' takes {'a value' if node.condition else 'a comparison'} "
                                "there: a comparison selects, in where() or an `if`, and joins others with & | ~")
        return self._unique((op, *map(id, nodes)), op, nodes)

    def scalar(self, value: Any) -> Scalar:
        if isinstance(value, Scalar):
            return value
        if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0:
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise RuleError(f"{written()}: {type(value).__name__} is not a number of coefficients(): they are "
                            "computed from the step count, hyperparameters and constants")
        return self._unique(("constant", repr(float(value))), "constant", (), float(value))

    def input(self, name: str) -> Scalar:
        self.names.append(name)
        self.inputs.append(self._unique(("input", name), "input", (), len(self.inputs)))
        return self.inputs[-1]

    def _unique(self, key: Any, op: str, arguments: tuple[Scalar, ...] = (), value: Any = None) -> Scalar:
        if key not in self._known:
            self._known[key] = Scalar(self, op, arguments, value)
            if arguments:
                self.nodes.append(self._known[key])
        return self._known[key]

    # --- Every way through the function -------------------------------------------------------------------------------

    def decide(self, condition: Scalar) -> bool:
        """Which way an `if` goes on this run."""
        if condition not in self._decided:
            if len(self._decided) == WAYS:
                raise self.too_many()
            taken = self._path[len(self._decided)] if len(self._decided) < len(self._path) else True
            self._decided[condition] = taken
        return self._decided[condition]

    def too_many(self) -> RuleError:
        return RuleError(f"{self.name}: more than {WAYS} ways lead through the `if`s of its coefficients (or a loop "
                         "depends on a number that only the device knows): use where(condition, a, b)")

    def explore(self, function: Callable[[], Mapping[str, Any]], path: Sequence[bool] = ()) -> dict[str, Scalar]:
        """The results of a function of symbols, of all ways that begin like `path`."""
        self._ways += 1
        if self._ways > WAYS:
            raise self.too_many()
        self._path, self._decided = list(path), {}
        results = {name: self.scalar(value) for name, value in function().items()}
        decided = list(self._decided)
        for index in reversed(range(len(path), len(decided))):
            taken = [*path, *[True] * (index - len(path))]
            others = self.explore(function, [*taken, False])
            if others.keys() != results.keys():
                raise RuleError(f"{self.name}: coefficients() returns {', '.join(results)} or {', '.join(others)}, "
                                "as an `if` decides: return the same names always")
            results = {name: value if value is others[name] else
                       self.record("where", (decided[index], value, others[name])) for name, value in results.items()}
        return results

    def keep(self, names: Sequence[str]) -> None:
        """Forget every output but these, and the order of the outputs is theirs."""
        self.outputs = {name: self.outputs[name] for name in names}

    @property
    def live(self) -> list[Scalar]:
        """The operations that the outputs need, in order."""
        needed: set[int] = set()
        stack = list(self.outputs.values())
        while stack:
            node = stack.pop()
            if id(node) not in needed:
                needed.add(id(node))
                stack.extend(node.arguments)
        return [node for node in self.nodes if id(node) in needed]


# --- Hyperparameters --------------------------------------------------------------------------------------------------

def structure(values: Mapping[str, Any]) -> Structure:
    """What a trace is made for: which hyperparameters are numbers, and the values of the others.

    >>> structure({"lr": 0.1, "betas": (0.9, 0.99), "no_prox": True})
    (('lr', 'number'), ('betas', ('number', 'number')), ('no_prox', ('is', True)))
    """
    return tuple((name, _structure(value)) for name, value in values.items())


def _structure(value: Any) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return "is", value
    return tuple(map(_structure, value)) if isinstance(value, (tuple, list)) else NUMBER


def numbers(values: Mapping[str, Any]) -> list[Any]:
    """The inputs of a trace beside the step count: every number (or tensor of one) of the hyperparameters.

    >>> numbers({"lr": 0.1, "betas": (0.9, 0.99), "no_prox": True})
    [0.1, 0.9, 0.99]
    """
    return [number for value in values.values() for number in _numbers(value)]


def _numbers(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _numbers(part)
    elif not (value is None or isinstance(value, (bool, str))):
        yield value


def _symbols(graph: ScalarGraph, name: str, kind: Any) -> Any:
    if kind == NUMBER:
        return graph.input(name)
    if len(kind) == 2 and kind[0] == "is":
        return kind[1]
    return tuple(_symbols(graph, f"{name}_{index}", part) for index, part in enumerate(kind))


def hyperparameters(rule: Rule, values: Mapping[str, Any]) -> dict[str, Any]:
    """What `coefficients` of a rule takes, of a parameter group and what else it reads."""
    return {name: values[name] for name in rule.hyperparameters}


def trace_scalars(rule: Rule, values: Mapping[str, Any]) -> ScalarGraph:
    """The graph of a rule's `coefficients`, for hyperparameters like these.

    Its outputs are the coefficients that `element` uses, in the order of the row.

    Arguments:
        values: a parameter group; running numbers and sums of a stage are hyperparameters too. Only which of them are
            numbers counts, and the values of those that are not.

    Raises:
        RuleError: `coefficients` does what cannot be traced; the message names the line and the remedy.

    Example:
        >>> from fasttrain.optim import Lion
        >>> graph = trace_scalars(Lion.rules[0], dict(lr=0.1, betas=(0.9, 0.99), weight_decay=0))
        >>> graph.names, list(graph.outputs)
        (['step', 'lr', 'betas_0', 'betas_1', 'weight_decay'], ['b1', 'a1', 'keep', 'lr', 'b2', 'a2'])
    """
    return _trace(rule, structure(hyperparameters(rule, values)))


@cache
def _trace(rule: Rule, kinds: Structure) -> ScalarGraph:
    graph = ScalarGraph(f"rule {rule.name}", kinds)
    step = graph.input("step").count()
    symbols = {name: _symbols(graph, name, kind) for name, kind in kinds}
    graph.outputs = graph.explore(lambda: rule.coefficients(step, **symbols))
    missing = [name for name in trace(rule).coefficients if name not in graph.outputs]
    if missing:
        raise RuleError(f"rule {rule.name}: element() uses k.{missing[0]}, which coefficients() does not return (it "
                        f"returns {', '.join(graph.outputs)})")
    graph.keep(trace(rule).coefficients)
    return graph
