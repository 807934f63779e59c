"""Coefficients as a device computes them: how they are traced, and its powers and logarithms."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, getcontext
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CPU, generator, uniform
from scalar_rows import ADAMW, GROUP, interpreted

from fasttrain.kernels import prologue
from fasttrain.kernels.prologue import Row
from fasttrain.kernels.trace import trace
from fasttrain.kernels.trace_scalars import ScalarGraph, structure, trace_scalars
from fasttrain.rule import Rule, RuleError, Step, log, maximum, sqrt, where


@cache
def mathematics() -> tuple[Rule, ScalarGraph]:
    rule = Rule("Mathematics", (), lambda step, x, y: dict(power=x**y, log=log(x), one=x**step),
                lambda p, g, k: p * k.power + g * k.log + k.one * g)
    return rule, trace_scalars(rule, dict(x=1.0, y=1.0))


def evaluate(pairs: list[tuple[float, float]], step: float = 1.0) -> list[dict[str, float]]:
    _, graph = mathematics()
    words = prologue.words(graph, [Row(dict(x=x, y=y), step=step) for x, y in pairs], CPU)
    rows = interpreted(graph, words, True)[0][:, 1:].tolist()
    return [dict(zip(graph.outputs, row, strict=True)) for row in rows]


def test_powers_and_logarithms_are_within_a_unit_in_the_last_place():
    getcontext().prec = 60
    numbers = generator(2)
    pairs = [(math.exp(uniform(-low, low, numbers)), uniform(-high, high, numbers))
             for low, high in ((1e-4, 1e5), (0.01, 1e4), (1, 300), (40, 10), (650, 1), (650, 1e-3)) for _ in range(60)]
    pairs += [(0.96, 4e-3 * step) for step in range(1, 60)] + [(5e-324, 0.5), (1e-310, -0.9), (0.5, 1021.5)]
    for (x, y), got in zip(pairs, evaluate(pairs), strict=True):
        for value, wanted in ((got["power"], Decimal(x) ** Decimal(y)), (got["log"], Decimal(x).ln())):
            assert abs(Decimal(value) - wanted) <= Decimal(math.ulp(float(wanted))) * Decimal("0.7"), (x, y)


def test_powers_of_special_numbers():
    """As the C library has them, but for negative bases, of which Python makes complex numbers."""
    bases = [0.0, 1.0, 0.5, 2.0, math.inf, math.nan, 5e-324, 1.7e308]
    pairs = [(x, y) for x in bases for y in (0.0, 1.0, -1.0, 0.5, -0.5, 1e300, -1e300, 2000.0, -2000.0, math.inf,
                                             -math.inf, math.nan)]
    with np.errstate(all="ignore"):
        libm = np.power([x for x, _ in pairs], [y for _, y in pairs])
    got = evaluate(pairs)
    for (x, y), one, wanted in zip(pairs, got, libm.tolist(), strict=True):
        assert one["power"] == wanted or (math.isnan(one["power"]) and math.isnan(wanted)), (x, y, one["power"])
        assert one["log"] == (-math.inf if x == 0 else math.log(x)) or math.isnan(x)
    assert all(math.isnan(one["power"]) and math.isnan(one["log"]) for one in evaluate([(-2.0, 0.5), (-1e-9, 3.0)]))


def test_counted_powers_are_those_of_step():
    for step in (1, 2, 3, 63, 1000, 99_999, (1 << 40) + 7):
        bases = (0.999, 1.0, -0.5, 1.5, 0.0)
        found = [one["one"] for one in evaluate([(base, 1.0) for base in bases], step)]
        assert found == [base ** Step(step) for base in bases]


# --- The tracer -------------------------------------------------------------------------------------------------------

def traced(function: Callable[..., dict[str, Any]], **values: Any) -> ScalarGraph:
    names = list(function(Step(2), **values))
    return trace_scalars(Rule("Own", (), function, lambda p, g, k: sum((getattr(k, name) * g for name in names), p)),
                         values)


def rows_of(graph: ScalarGraph, steps: list[int], **values: Any) -> list[dict[str, float]]:
    words = prologue.words(graph, [Row(values, step=step) for step in steps], CPU)
    return [dict(zip(graph.outputs, row[1:], strict=True)) for row in interpreted(graph, words, True)[0].tolist()]


def branching(step, lr, warmup, kind, decay):
    if step < warmup and lr > 0.0:
        rate = lr * step / warmup
    elif step > 20 or decay:
        rate = max(lr - decay * step, 0.01)
    else:
        rate = min(lr, 1.0)
    keep = {"none": 1.0, "all": 0.0}[kind] if kind is not None else 0.5
    return dict(rate=rate, keep=keep, square=rate**2, inverse=(1 + rate) ** -3, root=abs(-rate) ** 0.5)


@pytest.mark.parametrize("kind", [None, "none", "all"])
def test_an_if_is_followed_both_ways(kind):
    steps = [1, 4, 5, 6, 20, 21, 400]
    for lr, warmup, decay in ((0.5, 5.0, 0.001), (0.0, 5.0, 0.0), (2.0, 0.0, 0.0), (0.5, 10.0, 0.1)):
        values = dict(lr=lr, warmup=warmup, kind=kind, decay=decay)
        graph = traced(branching, **values)
        for step, got in zip(steps, rows_of(graph, steps, **values), strict=True):
            assert got == pytest.approx(branching(Step(step), **values), rel=1e-15, abs=0)


def test_the_vocabulary_and_numpy_have_one_meaning():
    def ours(step, a, b):
        return dict(clip=minimum_of(maximum(sqrt(a), 1.0), b), pick=where((a > b) & ~(a == 3.0), a, b),
                    largest=maximum(a, b), neg=-a)

    def minimum_of(a, b):
        return where((a < b) | (a != a), a, b)

    def numpy(step, a, b):
        return dict(clip=np.clip(np.sqrt(a), 1.0, b), pick=np.where((a > b) & ~np.equal(a, 3.0), a, b),
                    largest=np.maximum(a, b), neg=np.negative(a))

    for a, b in ((4.0, 9.0), (100.0, 2.0), (3.0, 2.0), (0.25, math.nan), (math.nan, 2.0)):
        got = [rows_of(trace_scalars(Rule("Own", (), one, lambda p, g, k: p + k.clip * g + k.pick * g + k.largest * g
                                          + k.neg * g), dict(a=a, b=b)), [1], a=a, b=b)[0] for one in (ours, numpy)]
        wanted = {name: float(value) for name, value in numpy(1, np.float64(a), np.float64(b)).items()}
        for one in got:
            assert one == pytest.approx(wanted, nan_ok=True, rel=0, abs=0)

    def fmax(step, a):
        return dict(most=np.fmax(1.0, a), least=np.fmin(1.0, a))
    for a in (0.5, 2.0, math.nan):
        assert rows_of(traced(fmax, a=a), [1], a=a)[0] == {name: float(value) for name, value in fmax(1, a).items()}


def unpacked(step, betas):
    b1, b2 = betas
    return dict(b1=b1, b2=b2)


@pytest.mark.parametrize("function, text", [
    (lambda step, lr: dict(lr=math.exp(lr)), r"math.*cannot be traced.*use sqrt\(\) and log\(\) of fasttrain.rule"),
    (lambda step, lr: dict(lr=float(lr)), "a conversion to a Python number"),
    (lambda step, lr: dict(lr=next(iter(lr))), "iteration over a number"),
    (lambda step, lr: dict(lr=lr // 2), "an integer division or remainder"),
    (lambda step, lr: dict(lr=np.exp(lr)), r"np.exp cannot be traced.*of NumPy there are absolute, add, clip"),
    (lambda step, lr: dict(lr=np.stack([lr, lr])), "np.stack cannot be traced"),
    (lambda step, lr: dict(lr=torch.sqrt(lr)), "torch.sqrt is outside the vocabulary"),
    (lambda step, lr: dict(lr="fast"), "str is not a number of coefficients"),
    (lambda step, lr: dict(lr=lr + (lr > 1.0)), "'add' takes a value there"),
    (lambda step, lr: dict(lr=where(lr, 1.0, 2.0)), "'where' takes a comparison there"),
    (lambda step, lr: dict(lr=lr) if lr > 1 else dict(lr=lr, more=lr), "return the same names always"),
    (lambda step, lr: dict(other=lr), "element\\(\\) uses k.lr, which coefficients\\(\\) does not return"),
])
def test_what_cannot_be_traced_is_refused(function, text):
    with pytest.raises(RuleError, match=text):
        trace_scalars(Rule("Own", (), function, lambda p, g, k: p - k.lr * g), dict(lr=0.1))


def test_errors_name_the_line():
    with pytest.raises(RuleError, match=r"test_scalar_trace.py:\d+: .*math.exp"):
        trace_scalars(Rule("Own", (), lambda step, lr: dict(lr=math.exp(lr)), lambda p, g, k: p - k.lr * g), dict(lr=1))


def test_too_many_ways_are_refused():
    def endless(step, lr):
        while step < 5:
            step = step + 1
        return dict(lr=lr * step)
    with pytest.raises(RuleError, match=r"more than 256 ways lead through the `if`s.*use where\(condition, a, b\)"):
        trace_scalars(Rule("Own", (), endless, lambda p, g, k: p - k.lr * g), dict(lr=0.1))


def test_elements_take_no_logarithm():
    with pytest.raises(RuleError, match=r"a logarithm is outside the vocabulary.*compute logarithms of scalars in"):
        trace(Rule("Own", (), lambda step, lr: dict(lr=lr), lambda p, g, k: p - k.lr * log(g)))


def test_a_trace_is_made_for_a_structure():
    group = dict(GROUP, betas=[0.5, 0.25])
    assert trace_scalars(ADAMW, group) is trace_scalars(ADAMW, GROUP)
    assert structure(dict(a=None, b="x", c=torch.ones(()), d=(1, (2, True)))) == (
        ("a", ("is", None)), ("b", ("is", "x")), ("c", "number"), ("d", ("number", ("number", ("is", True)))))
