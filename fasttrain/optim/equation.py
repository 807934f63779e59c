"""What a page that gives an equation must have, and whether its coefficients count steps."""

from __future__ import annotations

import dis
import inspect

from fasttrain.rule import Rule

EQUATION = ("an optimizer gives `state` (a tuple of names), `coefficients(step, **hyperparameters)` and "
            "`element(p, g, *state, k)`")


def reads_step(rule: Rule) -> bool:
    """Whether `coefficients` reads its first argument; assumed of what is not a function of Python.

    >>> reads_step(Rule("A", (), lambda step, lr: {"lr": lr}, lambda p, g, k: p - k.lr * g))
    False
    >>> reads_step(Rule("B", (), lambda step, lr: {"lr": lr / step}, lambda p, g, k: p - k.lr * g))
    True
    """
    function = inspect.unwrap(rule.coefficients)
    if not hasattr(function, "__code__"):
        return True
    name = next(iter(inspect.signature(function).parameters))
    read = (i.argval for i in dis.get_instructions(function.__code__) if i.opname.startswith("LOAD"))
    return any(name in (what if isinstance(what, tuple) else (what,)) for what in read)  # 3.13 loads two at once
