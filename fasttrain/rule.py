"""The vocabulary in which an optimizer's equation is written, and `Rule`, one equation.

An equation is two plain functions:

- ``coefficients(step, **hyperparameters)`` runs on the host in double precision and returns a dict of scalars: bias
  corrections and every product of scalars. They are rounded once, to the element type. For steps that are captured it
  is traced (`fasttrain.kernels.trace_scalars`): it may also use powers, `log` of this module, `if` on comparisons, and
  NumPy's functions of the same meaning.
- ``element(p, g, *state, k)`` is arithmetic on one element and returns the new parameter and the new states:
  ``+ - * /``, comparisons (joined by ``& | ~``), ``abs``, and from this module `sqrt`, `sign`, `where`, `minimum`,
  `maximum`. Every operation is one IEEE operation, rounded to nearest; nothing is contracted or reassociated.

The same function is evaluated by eager torch (`fasttrain.kernels.reference`), and traced to C++ and Triton
(`fasttrain.kernels.trace`). What the vocabulary means for NaN, zeros and denormals:

=================  ====================================================================================
``sqrt(x)``        correctly rounded; NaN for x < 0; ``sqrt(-0.0) == -0.0``; denormals are exact inputs
``abs(x)``         clears the sign bit; NaN stays NaN
``sign(x)``        1, -1, or x itself where x is a zero or NaN
``minimum(a, b)``  NaN if either is NaN; b where the two are equal (so on zeros of either sign)
``maximum(a, b)``  NaN if either is NaN; b where the two are equal
``where(c, a, b)`` a selection: the side that is not selected has no effect, even if NaN
comparisons        false if either side is NaN, except ``!=``, which is true
=================  ====================================================================================
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

__all__ = ["Operand", "Rule", "RuleError", "Step", "log", "maximum", "minimum", "sign", "sqrt", "where"]


class RuleError(TypeError):
    """An equation uses something outside the vocabulary; the message names the line and the remedy."""


class Operand:
    """A value inside `element`. Subclasses say what an operation does: compute it now, or record it.

    `apply(op, *arguments)` receives the names ``add sub mul div neg abs sqrt lt le gt ge eq ne and or not where``.
    """

    __slots__ = ()

    def apply(self, op: str, *arguments: Any) -> Any:
        raise NotImplementedError

    def refuse(self, what: str, remedy: str) -> RuleError:
        return RuleError(f"{what} is outside the vocabulary of a rule: {remedy}")

    def __add__(self, other): return self.apply("add", self, other)
    def __radd__(self, other): return self.apply("add", other, self)
    def __sub__(self, other): return self.apply("sub", self, other)
    def __rsub__(self, other): return self.apply("sub", other, self)
    def __mul__(self, other): return self.apply("mul", self, other)
    def __rmul__(self, other): return self.apply("mul", other, self)
    def __truediv__(self, other): return self.apply("div", self, other)
    def __rtruediv__(self, other): return self.apply("div", other, self)
    def __neg__(self): return self.apply("neg", self)
    def __abs__(self): return self.apply("abs", self)
    def __lt__(self, other): return self.apply("lt", self, other)
    def __le__(self, other): return self.apply("le", self, other)
    def __gt__(self, other): return self.apply("gt", self, other)
    def __ge__(self, other): return self.apply("ge", self, other)
    def __eq__(self, other): return self.apply("eq", self, other)
    def __ne__(self, other): return self.apply("ne", self, other)
    def __and__(self, other): return self.apply("and", self, other)
    def __or__(self, other): return self.apply("or", self, other)
    def __invert__(self): return self.apply("not", self)

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self):
        raise self.refuse("a Python `if`, `and`, `or` or `not` on a value", "use where(condition, a, b), & | and ~")

    def __float__(self):
        raise self.refuse("a conversion to a Python number (math.*, float())", "use sqrt() and the operators")

    __int__ = __index__ = __float__

    def __iter__(self):
        raise self.refuse("iteration over a value", "a rule sees one element")

    def __pow__(self, other):
        raise self.refuse("a power", "multiply, or compute powers of scalars in coefficients()")

    __rpow__ = __pow__

    def log(self):
        raise self.refuse("a logarithm", "compute logarithms of scalars in coefficients()")

    def count(self):
        raise self.refuse("a step count", "count steps in coefficients()")

    def __floordiv__(self, other):
        raise self.refuse("an integer division or remainder", "use /")

    __rfloordiv__ = __mod__ = __rmod__ = __floordiv__

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", str(func))
        raise RuleError(f"torch.{name} is outside the vocabulary of a rule: use + - * /, comparisons, abs, and "
                        "sqrt, sign, where, minimum, maximum from fasttrain.rule")


def _operand(*values: Any) -> Operand | None:
    return next((v for v in values if isinstance(v, Operand)), None)


def sqrt(x: Any) -> Any:
    """Square root, correctly rounded."""
    operand = _operand(x)
    return math.sqrt(x) if operand is None else operand.apply("sqrt", x)


def log(x: Any) -> Any:
    """Natural logarithm, of scalars in `coefficients` only."""
    operand = _operand(x)
    return math.log(x) if operand is None else operand.log()


def where(condition: Any, a: Any, b: Any) -> Any:
    """`a` where the condition holds, else `b`."""
    operand = _operand(condition, a, b)
    if operand is None:
        return a if condition else b
    return operand.apply("where", condition, a, b)


def minimum(a: Any, b: Any) -> Any:
    """The smaller of two values; NaN if either is NaN."""
    return where((a < b) | (a != a), a, b)


def maximum(a: Any, b: Any) -> Any:
    """The larger of two values; NaN if either is NaN."""
    return where((a > b) | (a != a), a, b)


def sign(x: Any) -> Any:
    """1.0 or -1.0, or x itself where x is a zero or NaN."""
    return where(x > 0.0, 1.0, where(x < 0.0, -1.0, x))


class Step(float):
    """A step count. ``b ** step`` is computed by repeated squaring, which host and device do identically.

    It is a float because Python asks the right operand first only where its type is a subclass of the left one's:
    of an int, the power would be the C library's.

    >>> 0.5 ** Step(3)
    0.125
    """

    def __new__(cls, value: Any) -> Any:
        return value.count() if isinstance(value, Operand) else super().__new__(cls, value)

    def __rpow__(self, base: Any, modulus: None = None) -> Any:
        result, factor, exponent = 1.0, base, int(self)
        while exponent:
            if exponent & 1:
                result = result * factor
            factor, exponent = factor * factor, exponent >> 1
        return result


@dataclass(frozen=True, eq=False)
class Rule:
    """One equation: a name, its states, and the two functions described at the top of this module.

    Arguments:
        name: an identifier, unique among the rules that are compiled together.
        state: names of the per-element states, in the order in which `element` takes and returns them.
        coefficients: ``(step, **hyperparameters) -> dict of name: float``.
        element: ``(p, g, *state, k) -> (p, *state)``, or just p where there is no state.
        positive: those of the states that are never negative, such as second moments: kept in few bits, they need no
            sign, and one that is not zero must not become zero.
        retain: for each state that is a running average or sum, the coefficient that multiplies its old value. Kept in
            few bits, a state that retains nearly everything must be rounded stochastically, or it never decays.
        exact: states that hold weights and not moments, which are never kept in fewer bits than fp32.
        sums: None, but for a stage of an optimizer with reductions (`fasttrain.optim.two_stage`): the names of the sums
            over all elements that the walk makes; `element` returns their terms after the states.

    Example:
        >>> from fasttrain.rule import Rule
        >>> descent = Rule("Descent", (), lambda step, lr: {"lr": lr}, lambda p, g, k: p - k.lr * g)
        >>> descent.scalars(1, {"lr": 0.5, "foreach": None})
        {'lr': 0.5}
    """

    name: str
    state: tuple[str, ...]
    coefficients: Callable[..., dict[str, float]]
    element: Callable[..., Any]
    positive: tuple[str, ...] = ()
    retain: Mapping[str, str] = field(default_factory=dict)
    exact: tuple[str, ...] = ()
    sums: tuple[str, ...] | None = None

    @classmethod
    def of(cls, page: type) -> Rule:
        """The rule of a class that holds `state`, `coefficients`, `element` and, where it has them, the rest."""
        return cls(page.__name__, tuple(page.state), page.coefficients, page.element,  # type: ignore[attr-defined]
                   tuple(getattr(page, "positive", ())), dict(getattr(page, "retain", {})),
                   tuple(getattr(page, "exact", ())))

    @cached_property
    def hyperparameters(self) -> tuple[str, ...]:
        """The names of the hyperparameters that `coefficients` reads."""
        return tuple(inspect.signature(self.coefficients).parameters)[1:]

    def scalars(self, step: Any, group: Mapping[str, Any]) -> dict[str, Any]:
        """The coefficients by name, for one step count and the hyperparameters of one parameter group."""
        step = Step(step) if isinstance(step, int) else step
        return self.coefficients(step, **{name: group[name] for name in self.hyperparameters})
