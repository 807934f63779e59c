"""Coefficients that a device computes are the host's: traced, printed as C++ and Triton, and made into rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from decimal import Decimal, getcontext
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CPU, ROOT, assert_same_bits, generator, needs_native, uniform
from structures import choices
from torch import Tensor

from fasttrain import optim
from fasttrain.kernels import emit_scalars, native, prologue
from fasttrain.kernels.item import Tail
from fasttrain.kernels.program import OPERATIONS, Addresses, described, program, with_slots
from fasttrain.kernels.prologue import FIXED, Row
from fasttrain.kernels.trace import trace
from fasttrain.kernels.trace_scalars import ScalarGraph, hyperparameters, structure, trace_scalars
from fasttrain.optim import RULES, STAGES
from fasttrain.optim.clip import coefficient
from fasttrain.optim.equation import reads_step
from fasttrain.rule import Rule, RuleError, Step, log, maximum, sqrt, where

ALL = (*RULES, *STAGES)
LAST = 100_000
POWERS = [1 << i for i in range(1, 17)]
SAMPLE = sorted({*range(1, 201), *(p + d for p in POWERS for d in (-1, 0, 1)), 997, 9_999, 31_415, 99_999, LAST})
COMMON = dict(
    eps=1e-8, weight_decay=0.01, momentum=0.9, dampening=0.1, rho=0.9, lr_decay=0.01, alpha=5.0, lambd=1e-4, eta=0.01,
    mu=0.3, momentum_decay=4e-3, mu_product=0.37, etas=(0.5, 1.2), step_sizes=(1e-6, 50.0), weight_sum=0.02,
    lr_max=1e-3, warmup_steps=1000, r=0.5, weight_lr_power=2.0, ratio=2.0, clamp=(0.0, 10.0), trust_coefficient=1e-3,
    p_sq=31.0, g_sq=0.4, update_sq=2.7, ratio_sq=2.5e6, elements=1e6, beta3_warmup=50_000, alpha_warmup=70_000)
# Everything else of a row in four settings; betas are cut to what a rule takes.
SETTINGS: dict[str, dict[str, Any]] = {
    "usual": {**COMMON, "lr": 1e-3, "betas": (0.9, 0.999, 0.9999)},
    "no averages": {**COMMON, "lr": 0.3, "betas": (0.0, 0.0, 0.0), "weight_decay": 0.0, "momentum": 0.0, "rho": 0.0,
                    "warmup_steps": 0, "p_sq": 0.0},
    "long averages": {**COMMON, "lr": 2e-5, "betas": (0.99, 0.9999, 0.99999), "weight_decay": 0.3, "momentum": 0.9999,
                      "momentum_decay": 0.0, "ratio_sq": math.nan, "r": 0.0, "mu": 1.0},
    "no rate": {**COMMON, "lr": 0.0, "betas": (0.5, 0.7, 0.9), "eps": 0.0, "weight_sum": 0.0, "lr_max": -1.0,
                "eta": 0.0, "mu_product": 0.0, "update_sq": 0.0},
}


def cases() -> list[tuple[Rule, Mapping[str, Any]]]:
    """Every rule with every choice of its options, each computation once."""
    made = {}
    for rule in ALL:
        for chosen in choices(rule):
            graph = trace_scalars(rule, chosen)
            made.setdefault((emit_scalars.digest(graph), rule.coefficients), (rule, chosen))
    return list(made.values())


CASES = cases()
IDS = ["-".join([rule.name, *(f"{name}={value}" for name, value in chosen.items()
                              if value is None or isinstance(value, bool))]) for rule, chosen in CASES]


def setting(rule: Rule, chosen: Mapping[str, Any], name: str, step: int = 1) -> dict[str, Any]:
    """The hyperparameters of a rule in one of `SETTINGS`, with the options chosen."""
    values = dict(SETTINGS[name], k=step - 1)  # schedule-free optimizers count for themselves
    for key, kind in chosen.items():
        if kind is None or isinstance(kind, bool):
            values[key] = kind
        elif isinstance(kind, tuple):
            values[key] = values[key][: len(kind)]
    return {key: values[key] for key in chosen}


def on_host(rule: Rule, values: Mapping[str, Any], step: int) -> list[float]:
    with np.errstate(all="ignore"):  # of second stages: norms that are zero or not finite
        return trace(rule).row(step, values)


def words_of(rule: Rule, chosen: Mapping[str, Any], name: str, steps: np.ndarray) -> np.ndarray:
    """The words of one row for each step, made at once."""
    values = setting(rule, chosen, name)
    graph = trace_scalars(rule, values)
    block = np.repeat(prologue.words(graph, [Row(values)], CPU), len(steps), 0)
    for place, each in enumerate(graph.names):
        if each in ("step", "k"):
            counted = steps if each == "step" else steps - 1
            block[:, 3 * (len(FIXED) + place) + 2] = counted.astype(np.float64).view(np.int64)
    return block


def compiled(graph: ScalarGraph, words: np.ndarray, wide: bool, kept: bool = False) -> tuple[Tensor, Tensor]:
    """Rows by the text of the CUDA kernel, whose last slot lies before memory that nothing may write."""
    made, rows, width = program(graph), len(words), prologue.width(graph, kept)
    out = torch.full((rows, width), 77.0, dtype=torch.float64 if wide else torch.float32)
    skip = torch.full((rows,), 77, dtype=torch.int32)
    slots = np.full(rows * made.slots + 1, 77.0)
    at = Addresses(made.words.ctypes.data, words.ctypes.data, out.data_ptr(), skip.data_ptr())
    table = with_slots(described(at, rows, words.shape[1] // 3, width, wide, kept), slots.ctypes.data)
    native.module().cuda_host_walk("prologue", table, np.zeros(1, np.uint8), 3, 5, [2, 0, 1])
    assert slots[-1] == 77.0
    return out, skip


def interpreted(graph: ScalarGraph, words: np.ndarray, wide: bool, kept: bool = False) -> tuple[Tensor, Tensor]:
    """Rows by Triton's interpreter."""
    pytest.importorskip("triton", reason="triton is not installed")
    shape = (len(words), prologue.width(graph, kept))
    out = torch.full(shape, 77.0, dtype=torch.float64 if wide else torch.float32)
    skip = torch.full((len(words),), 77, dtype=torch.int32)
    prologue.run(graph, torch.from_numpy(words), out, skip, kept)
    return out, skip


# --- The numbers ------------------------------------------------------------------------------------------------------

# In float64, twice what was measured. Real powers (and 0.5, a square root on the device) differ from the C library's
# in the last place, and what is subtracted from 1 afterwards shows it larger: with a beta3 of 0.9999 one unit of it is
# 2^13 units of 1 - beta3.
ULPS = {"Adan": 4, "AdEMAMix": 1 << 14, "AdEMAMixWithoutFast": 1 << 14, "NAdam": 16, "ScheduleFreeAdamW": 512,
        "ScheduleFreeSGD": 512}


def check_steps(rule: Rule, chosen: Mapping[str, Any], name: str, steps: np.ndarray) -> float:
    """Compare with the host: every fp32 coefficient the same. Returns the largest difference in fp64, in ULP."""
    graph, words = trace_scalars(rule, chosen), words_of(rule, chosen, name, steps)
    values = setting(rule, chosen, name)
    wanted = np.array([[1.0, *on_host(rule, dict(values, k=step - 1) if "k" in values else values, step)]
                       for step in steps.tolist()])
    narrow = compiled(graph, words, False)[0]
    assert_same_bits(narrow, torch.from_numpy(wanted).float(), f"{rule.name}, {name}")
    wide = compiled(graph, words, True)[0].numpy()
    with np.errstate(invalid="ignore"):
        apart = np.abs(wide - wanted) / np.spacing(np.abs(wanted))
    assert (np.isfinite(wide) == np.isfinite(wanted)).all()
    return float(np.nanmax(np.where(wide == wanted, 0.0, apart), initial=0.0))


@needs_native
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("rule, chosen", CASES, ids=IDS)
def test_the_device_has_the_coefficients_of_the_host(rule, chosen, name):
    assert check_steps(rule, chosen, name, np.array(SAMPLE)) <= ULPS.get(rule.name, 2)


STEPPING = [(rule, chosen) for rule, chosen in CASES if reads_step(rule) or "k" in rule.hyperparameters]
QUICK = {rule.coefficients: chosen for rule, chosen in STEPPING}  # each function once, with all of its options
LONG = [pytest.param(rule, chosen, name, id=f"{IDS[CASES.index((rule, chosen))]}-{name}",
                     marks=[] if name == "usual" and QUICK[rule.coefficients] is chosen else [pytest.mark.slow])
        for rule, chosen in STEPPING for name in SETTINGS]


@needs_native
@pytest.mark.parametrize("rule, chosen, name", LONG)
def test_at_every_step_to_100_000(rule, chosen, name):
    assert check_steps(rule, chosen, name, np.arange(1, LAST + 1)) <= ULPS.get(rule.name, 2)


@needs_native
@pytest.mark.parametrize("rule, chosen", CASES, ids=IDS)
def test_triton_has_the_bits_of_cpp(rule, chosen):
    """In float64, of which float32 is one rounding: all settings in one launch."""
    graph = trace_scalars(rule, chosen)
    words = np.concatenate([words_of(rule, chosen, name, np.array(SAMPLE)) for name in SETTINGS])
    assert_same_bits(interpreted(graph, words, True)[0], compiled(graph, words, True)[0], rule.name)


def test_triton_rounds_once():
    rule, chosen = CASES[0]
    graph, words = trace_scalars(rule, chosen), words_of(rule, chosen, "usual", np.array(SAMPLE))
    assert_same_bits(interpreted(graph, words, False)[0], interpreted(graph, words, True)[0].float())


# --- Rows -------------------------------------------------------------------------------------------------------------

RUNNERS = [pytest.param(compiled, id="C++", marks=needs_native), pytest.param(interpreted, id="triton")]
Run = Callable[..., tuple[Tensor, Tensor]]
ADAMW = optim.AdamW.rules[0]
GROUP = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)


@pytest.mark.parametrize("run", RUNNERS)
def test_what_multiplies_the_gradient(run: Run):
    """Loss scale, clipping by the norm of all and of one, and the sign, as a step on the host multiplies them."""
    numbers = generator(1)
    rows, wanted = [], []
    for i in range(200):
        grad_scale, norm, square = (10 ** uniform(-6, 6, numbers) for _ in range(3))
        norm, square = {7: (math.inf, square), 8: (math.nan, square), 9: (norm, math.nan)}.get(i, (norm, square))
        limit, each = (None if (i >> bit) % 2 else 10 ** uniform(-3, 3, numbers) for bit in (0, 1))
        sign = -1.0 if i % 3 else 1.0
        own = coefficient(norm, limit) / grad_scale
        own = own * (1.0 if each is None else coefficient(abs(own) * math.sqrt(square), each))
        wanted.append(sign * own)
        tensors = [torch.tensor(value, dtype=torch.float64) for value in (grad_scale, norm, square)]
        on_device = i % 5 < 3
        rows.append(Row(GROUP, scale=sign, grad_scale=tensors[0] if on_device else grad_scale,
                        norm=tensors[1] if on_device else norm, max_norm=limit,
                        square=tensors[2] if on_device else square, max_each=each))
    graph = trace_scalars(ADAMW, GROUP)
    words = prologue.words(graph, rows, CPU)
    assert_same_bits(run(graph, words, True)[0][:, 0], torch.tensor(wanted, dtype=torch.float64))
    assert_same_bits(run(graph, words, False)[0][:, 0], torch.tensor(wanted, dtype=torch.float64).float())


@pytest.mark.parametrize("run", RUNNERS)
def test_tails(run: Run):
    rows = [Row(GROUP, clip_value=clip, ema_decay=decay) for clip in (None, 0.1) for decay in (None, 0.9999)]
    graph = trace_scalars(ADAMW, GROUP)
    out = run(graph, prologue.words(graph, rows, CPU), True, kept=True)[0]
    wanted = [Tail(), Tail(keep=0.9999, add=1 - 0.9999), Tail(0.1), Tail(0.1, 0.9999, 1 - 0.9999)]
    assert_same_bits(out[:, -3:], torch.tensor(wanted, dtype=torch.float64))
    assert out.shape[1] == 1 + len(trace(ADAMW).coefficients) + 3


@pytest.mark.parametrize("run", RUNNERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.int64], ids=str)
def test_a_step_count_on_the_device(run: Run, dtype: torch.dtype):
    """It is the number of steps made: the row is that of the one to come. A block of words serves many steps."""
    counter = torch.zeros((), dtype=dtype)
    graph = trace_scalars(ADAMW, GROUP)
    words = prologue.words(graph, [Row(GROUP, counter=counter)], CPU)
    for made in (0, 1, 2, 999, 99_999):
        counter.fill_(made)
        assert run(graph, words, True)[0][0].tolist() == [1.0, *on_host(ADAMW, GROUP, made + 1)]


@pytest.mark.parametrize("run", RUNNERS)
def test_hyperparameters_on_the_device(run: Run):
    lr, beta = torch.tensor(0.25), torch.tensor(0.75, dtype=torch.float64)
    graph = trace_scalars(ADAMW, dict(GROUP, lr=lr))
    words = prologue.words(graph, [Row(dict(GROUP, lr=lr, betas=(beta, 0.999)), step=3)], CPU)
    for rate in (0.25, 0.125, 0.0):
        lr.fill_(rate)
        assert run(graph, words, True)[0][0].tolist() == [1.0, *on_host(ADAMW, dict(GROUP, lr=rate,
                                                                                  betas=(0.75, 0.999)), 3)]


@pytest.mark.parametrize("run", RUNNERS)
def test_a_step_that_is_skipped_says_so(run: Run):
    found = [torch.tensor(True), torch.tensor(False), torch.tensor(2.0), torch.tensor(0.0), 1.0, 0.0,
             torch.tensor(math.nan), torch.tensor([3], dtype=torch.int64)]
    graph = trace_scalars(ADAMW, GROUP)
    skip = run(graph, prologue.words(graph, [Row(GROUP, found=one) for one in found], CPU), False)[1]
    assert skip.tolist() == [1, 0, 1, 0, 1, 0, 1, 1]


@needs_native
@pytest.mark.parametrize("optimizer", [*optim.OPTIMIZERS, optim.Adam], ids=lambda one: one.__name__)
@pytest.mark.parametrize("kept", [False, True], ids=["plain", "kept"])
def test_rows_of_the_optimizers(optimizer, kept):
    """What a step on the host makes of a parameter group."""
    options = {}
    if kept:
        if optimizer.running or issubclass(optimizer, optim.schedule_free.ScheduleFree):
            pytest.skip("its states are not kept in other ways")
        options = dict(clip_value=0.5, ema_decay=0.99)
    made = optimizer([torch.nn.Parameter(torch.ones(2))], maximize=True, **options)
    group = dict(made.param_groups[0], **dict.fromkeys(made.running, 0.5))
    rule = made.rule_of(group)
    values = hyperparameters(rule, group)
    graph = trace_scalars(rule, values)
    for step in (1, 2, 10):
        row = Row(values, step=step, scale=-1.0, grad_scale=8.0, clip_value=group.get("clip_value"),
                  ema_decay=group.get("ema_decay"))
        wanted = torch.tensor([made._row(rule, group, step, 1 / 8)], dtype=torch.float64)
        assert_same_bits(compiled(graph, prologue.words(graph, [row], CPU), True, kept)[0], wanted, optimizer.__name__)


def test_numbers_that_cannot_be_read_are_refused():
    graph = trace_scalars(ADAMW, GROUP)
    for wrong, error, text in ((torch.tensor(1.0, dtype=torch.bfloat16), TypeError, "lr is a tensor of torch.bfloat16"),
                               (torch.ones(2), ValueError, r"lr is a tensor of shape \(2,\) on cpu"),
                               (torch.ones((), device="meta"), ValueError, "lr is a tensor of shape .* on meta")):
        with pytest.raises(error, match=text):
            prologue.words(graph, [Row(dict(GROUP, lr=wrong))], CPU)
    with pytest.raises(ValueError, match="row 0 has 7: trace it again"):
        prologue.words(graph, [Row(dict(GROUP, betas=(0.9, 0.99, 0.999)))], CPU)


# --- Powers and logarithms --------------------------------------------------------------------------------------------

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
        for base in (0.999, 1.0, -0.5, 1.5, 0.0):
            assert evaluate([(base, 1.0)], step)[0]["one"] == base ** Step(step)


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
    with pytest.raises(RuleError, match=r"test_coefficients.py:\d+: .*math.exp"):
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


# --- Programs ---------------------------------------------------------------------------------------------------------

def test_programs_use_few_slots():
    """Of every rule: an operation's numbers are those that something still reads."""
    assert max(program(trace_scalars(rule, chosen)).slots for rule, chosen in CASES) <= 32


def test_a_program_that_is_too_long_is_refused():
    graph = trace_scalars(ADAMW, GROUP)
    wide = ScalarGraph("rule Own")
    wide.outputs = {str(i): wide.scalar(float(i)) for i in range(program(graph).slots + (1 << 14))}
    with pytest.raises(ValueError, match=r"rule Own: 0 numbers, \d+ coefficients and 1 at a time"):
        program(wide)


def test_names_of_places_are_those_of_the_source():
    source = (ROOT / "csrc/cuda/prologue.cuh").read_text()
    camel = ["k" + "".join(part.capitalize() for part in name.split("_")) for name in FIXED]
    assert f"enum Fixed {{ {', '.join(camel)}, kFixed }};" in source
    inside = source.split("enum Operation : u32 {")[1].split("}")[0]
    camel = ["k" + "".join(part.capitalize() for part in name.split("_")) for name in OPERATIONS]
    assert [name.strip() for name in inside.split(",")] == camel
