"""What the tests of optimizers share: bits, layouts, special values, and the registry of configurations."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from fasttrain.kernels import dispatch, native
from fasttrain.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Adan,
    AdEMAMix,
    Lion,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
    ScheduleFreeAdamW,
    ScheduleFreeSGD,
)

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
REALS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

needs_native = pytest.mark.skipif(native.load()[0] is None, reason=f"no compiled part: {native.load()[1]}")


# --- Bits -------------------------------------------------------------------------------------------------------------

def bits(tensor: Tensor) -> Tensor:
    """The elements as integers, in row-major order; every NaN as the same one."""
    tensor = tensor.detach().cpu()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    tensor = tensor.resolve_neg().contiguous()
    view = tensor.view(INTEGERS[tensor.element_size()])
    return torch.where(tensor != tensor, torch.full_like(view, -1), view) if tensor.is_floating_point() else view


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether dtype, shape and every bit agree; any NaN equals any NaN. `torch.equal` is wrong on NaN and zeros."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def assert_same_bits(got: Tensor, wanted: Tensor, what: str = "") -> None:
    """Fail with the first elements that differ."""
    if same_bits(got, wanted):
        return
    head = f"{what}: {got.dtype} {tuple(got.shape)} against {wanted.dtype} {tuple(wanted.shape)}"
    if got.dtype != wanted.dtype or got.shape != wanted.shape:
        raise AssertionError(head)
    differ = (bits(got) != bits(wanted)).flatten().nonzero().flatten()
    a, b = (torch.view_as_real(t).flatten() if t.is_complex() else t.flatten() for t in (got.detach(), wanted.detach()))
    rows = [f"  [{i}] {a[i].item()!r} against {b[i].item()!r}" for i in differ[:5].tolist()]
    raise AssertionError(f"{head}: {len(differ)} of {a.numel()} differ\n" + "\n".join(rows))


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance from |x| to the next number of a dtype, in float64; of the smallest normal number below it."""
    info = torch.finfo(dtype)
    return torch.exp2(torch.floor(torch.log2(x.double().abs().clamp_min(info.smallest_normal)))) * info.eps


# --- Numbers ----------------------------------------------------------------------------------------------------------

def generator(seed: int) -> torch.Generator:
    """A generator; its seed is printed, which pytest shows where a test fails. FASTTRAIN_SEED shifts all of them."""
    seed += int(os.environ.get("FASTTRAIN_SEED", "0"))
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def normal(shape: Sequence[int], dtype: torch.dtype, numbers: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), dtype=torch.float64, generator=numbers).to(dtype)


def uniform(low: float, high: float, numbers: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), dtype=torch.float64, generator=numbers).item()


def specials(dtype: torch.dtype) -> list[float]:
    """NaN, infinities, zeros of both signs, the ends of the normal and denormal numbers, and plain ones."""
    info = torch.finfo(dtype)
    tiny = info.smallest_normal
    signed = [math.inf, info.max, 3.0, 1.0, 0.1, tiny, tiny * (1 - info.eps), tiny * info.eps, 0.0]
    return [math.nan, *signed, *(-x for x in signed)]


# --- Layouts ----------------------------------------------------------------------------------------------------------

# size, strides, offset in the storage
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    "empty": ((0,), (1,), 0),
    "empty, odd strides": ((3, 0, 2), (1, 3, 3), 2),
    "scalar": ((), (), 1),
    "one": ((1,), (7,), 3),
    "odd": ((1021,), (1,), 0),
    "misaligned": ((1000,), (1,), 1),
    "matrix": ((24, 17), (17, 1), 5),
    "transposed": ((9, 33), (1, 9), 0),
    "channels last": ((2, 5, 3, 4), (60, 1, 20, 5), 0),
    "size-1 dims": ((1, 17, 1), (999, 1, 5), 2),
    "strided": ((13, 7), (20, 2), 5),
    "rows": ((8, 10), (16, 1), 2),
    "column": ((50, 1), (3, 1), 1),
    "chunks": ((20_001,), (1,), 7),
}
GUARD = 77.0  # what lies around a view


@dataclass
class Made:
    """A view inside a larger storage, whose other elements nobody may write."""

    view: Tensor
    storage: Tensor
    inside: Tensor

    def check(self, what: str) -> None:
        assert bool((self.storage[~self.inside] == GUARD).all()), f"{what}: elements around the view were written"


def make(layout: str, values: Callable[[tuple[int, ...]], Tensor]) -> Made:
    """A tensor of a layout of the table, filled with ``values(size)``."""
    size, strides, offset = LAYOUTS[layout]
    reach = offset + 1 + sum((n - 1) * stride for n, stride in zip(size, strides, strict=True) if n > 1)
    filled = values(size)
    storage = torch.full((reach + 9,), GUARD, dtype=filled.dtype)
    inside = torch.zeros(reach + 9, dtype=torch.bool)
    view = storage.as_strided(size, strides, offset)
    view.copy_(filled)
    inside.as_strided(size, strides, offset).fill_(True)
    return Made(view, storage, inside)


# --- Configurations ---------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Configuration:
    """One combination of an optimizer's options. A pair (low, high) is drawn for each run; other values stand."""

    name: str
    optimizer: type[Optimizer]
    options: dict[str, Any] = field(default_factory=dict)

    def draw(self, numbers: torch.Generator) -> dict[str, Any]:
        drawn = {key: uniform(*value, numbers) if isinstance(value, tuple) else value
                 for key, value in self.options.items()}
        if "b1" in drawn:
            drawn["betas"] = tuple(drawn.pop(key) for key in ("b1", "b2", "b3") if key in drawn)
        return drawn


ADAM = dict(lr=(1e-4, 0.1), b1=(0.0, 0.99), b2=(0.5, 0.9999), eps=(1e-10, 1e-3))
L2 = dict(weight_decay=(1e-4, 0.3))
DESCENT = dict(lr=(1e-4, 0.5))
MOMENTUM = dict(DESCENT, momentum=(0.1, 0.99))
LION = dict(lr=(1e-5, 1e-2), b1=(0.0, 0.99), b2=(0.0, 0.999))
THREE_BETAS = dict(ADAM, b3=(0.5, 0.9999))
SCHEDULE_FREE = dict(lr=(1e-3, 0.5), **L2, warmup_steps=3, r=(0.0, 1.0), weight_lr_power=(0.0, 3.0))

CONFIGURATIONS = [
    Configuration("AdamW", AdamW, dict(ADAM, weight_decay=(1e-4, 0.5))),
    Configuration("AdamW defaults", AdamW),
    Configuration("AdamW no decay", AdamW, dict(ADAM, weight_decay=0.0)),
    Configuration("AdamW amsgrad", AdamW, dict(ADAM, weight_decay=(0.0, 0.1), amsgrad=True)),
    Configuration("AdamW maximize", AdamW, dict(ADAM, maximize=True)),
    Configuration("AdamW no epsilon", AdamW, dict(ADAM, eps=0.0)),
    Configuration("Adam", Adam, ADAM),
    Configuration("Adam defaults", Adam),
    Configuration("Adam L2", Adam, dict(ADAM, **L2)),
    Configuration("Adam amsgrad", Adam, dict(ADAM, amsgrad=True)),
    Configuration("Adam L2 amsgrad maximize", Adam, dict(ADAM, **L2, amsgrad=True, maximize=True)),
    Configuration("Adam decoupled", Adam, dict(ADAM, **L2, decoupled_weight_decay=True)),
    Configuration("SGD", SGD, DESCENT),
    Configuration("SGD L2", SGD, dict(DESCENT, **L2)),
    Configuration("SGD maximize L2", SGD, dict(DESCENT, **L2, maximize=True)),
    Configuration("SGD momentum", SGD, dict(MOMENTUM, dampening=(0.0, 0.9))),
    Configuration("SGD momentum L2", SGD, dict(MOMENTUM, **L2, dampening=(0.0, 0.9), maximize=True)),
    Configuration("SGD nesterov", SGD, dict(MOMENTUM, nesterov=True)),
    Configuration("SGD nesterov L2", SGD, dict(MOMENTUM, **L2, nesterov=True)),
    Configuration("Lion defaults", Lion),
    Configuration("Lion", Lion, dict(LION, weight_decay=(0.0, 1.0))),
    Configuration("Lion maximize", Lion, dict(LION, maximize=True)),
    Configuration("Adadelta", Adadelta, dict(lr=(0.1, 2.0), rho=(0.1, 0.99), eps=(1e-8, 1e-3), **L2)),
    Configuration("Adadelta maximize", Adadelta, dict(maximize=True)),
    Configuration("Adagrad", Adagrad, dict(lr=(1e-3, 0.5), lr_decay=(0.0, 0.3), **L2)),
    Configuration("Adagrad initial value", Adagrad, dict(initial_accumulator_value=0.3, maximize=True)),
    Configuration("Adamax", Adamax, dict(ADAM, **L2)),
    Configuration("Adamax maximize", Adamax, dict(maximize=True)),
    Configuration("ASGD", ASGD, dict(lr=(1e-3, 0.5), lambd=(1e-4, 0.1), alpha=(0.5, 1.0), t0=2, **L2)),
    Configuration("ASGD maximize", ASGD, dict(maximize=True)),
    Configuration("NAdam", NAdam, dict(ADAM, **L2, momentum_decay=(1e-3, 0.3))),
    Configuration("NAdam decoupled maximize", NAdam, dict(ADAM, **L2, decoupled_weight_decay=True, maximize=True)),
    Configuration("RAdam", RAdam, dict(ADAM, **L2, b2=(0.9, 0.9999))),
    Configuration("RAdam decoupled maximize", RAdam, dict(L2, decoupled_weight_decay=True, maximize=True)),
    Configuration("RMSprop", RMSprop, dict(lr=(1e-4, 0.1), alpha=(0.5, 0.99), eps=(1e-8, 1e-3), **L2)),
    Configuration("RMSprop momentum", RMSprop, dict(MOMENTUM, maximize=True)),
    Configuration("RMSprop centered", RMSprop, dict(DESCENT, centered=True)),
    Configuration("RMSprop centered momentum", RMSprop, dict(MOMENTUM, **L2, centered=True)),
    Configuration("Rprop", Rprop, dict(lr=(1e-3, 0.1), etas=[0.4, 1.3], step_sizes=[1e-3, 0.2])),
    Configuration("Rprop maximize", Rprop, dict(maximize=True)),
    Configuration("Adan", Adan, dict(THREE_BETAS, **L2)),
    Configuration("Adan no prox", Adan, dict(THREE_BETAS, **L2, no_prox=True, maximize=True)),
    Configuration("AdEMAMix", AdEMAMix, dict(THREE_BETAS, **L2, beta3_warmup=3, alpha_warmup=5)),
    Configuration("AdEMAMix without fast", AdEMAMix, dict(THREE_BETAS, **L2, b1=0.0, maximize=True)),
    Configuration("ScheduleFreeSGD", ScheduleFreeSGD, dict(SCHEDULE_FREE, momentum=(0.1, 0.99))),
    Configuration("ScheduleFreeSGD maximize", ScheduleFreeSGD, dict(maximize=True)),
    Configuration("ScheduleFreeAdamW", ScheduleFreeAdamW, dict(SCHEDULE_FREE, b1=(0.1, 0.99), b2=(0.5, 0.9999))),
    Configuration("ScheduleFreeAdamW maximize", ScheduleFreeAdamW, dict(maximize=True)),
]
BY_NAME = {configuration.name: configuration for configuration in CONFIGURATIONS}


# --- Runs -------------------------------------------------------------------------------------------------------------

def usable(name: str) -> str | None:
    """Why a backend cannot run on the CPU here, or None."""
    try:
        return dispatch.load(name).why_not(CPU)
    except ImportError as error:
        return f"backend {name} cannot be imported: {error}"


@dataclass(frozen=True)
class Case:
    """A few steps of one optimizer over parameters of several layouts."""

    configuration: str
    param: torch.dtype = torch.float32
    grad: torch.dtype | None = None  # another dtype than the parameter's
    state: torch.dtype | None = None  # another dtype than the parameter's: loaded before the first step
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    steps: int = 4
    seed: int = 0

    def __str__(self) -> str:
        kinds = "/".join(str(kind).removeprefix("torch.") for kind in (self.param, self.grad, self.state) if kind)
        return f"{self.configuration}-{kinds}"


def run(case: Case, backend: str) -> dict[str, Tensor]:
    """Parameters and states after the steps of a case. Gradients come and go: some are missing on some steps, some
    have another layout than their parameter, every one has a fresh pointer.
    """
    numbers = generator(case.seed)
    options = BY_NAME[case.configuration].draw(numbers)
    made = {layout: make(layout, lambda size: normal(size, case.param, numbers)) for layout in case.layouts}
    params = [Parameter(m.view) for m in made.values()]
    half = len(params) // 2
    groups = [{"params": params[:half]}, {"params": params[half:], "lr": options.get("lr", 1e-3) / 3}]
    optimizer = BY_NAME[case.configuration].optimizer([g for g in groups if g["params"]], **options, backend=backend)
    if case.state is not None:
        load_states(optimizer, params, case.state, numbers)
    for step in range(case.steps):
        for i, (p, layout) in enumerate(zip(params, made, strict=True)):
            grad = normal(p.shape, case.grad or case.param, numbers) * 10 ** uniform(-3, 1, numbers)
            if case.grad is not None:
                p.grad_dtype = case.grad
            like_param = make(layout, lambda size, grad=grad: grad).view
            p.grad = None if (i + step) % 5 == 3 and step else grad if (i + step) % 4 == 1 else like_param
        optimizer.step()
    for layout, m in made.items():
        m.check(f"{case}, {layout}")
    tensors = dict(zip(made, params, strict=True))
    return {f"{layout} {key}": value.detach().clone()
            for layout, p in tensors.items() for key, value in [("p", p), *sorted(optimizer.state[p].items())]}


def load_states(optimizer: Optimizer, params: list[Parameter], dtype: torch.dtype, numbers: torch.Generator) -> None:
    """Load a checkpoint of some steps whose states have a dtype of their own."""
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p in params:
        p.grad = None
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        for key, value in state.items():
            if key != "step":
                state[key] = normal(value.shape, dtype, numbers).abs().as_strided(value.shape, value.stride())
    optimizer.load_state_dict(saved)


def assert_same_run(got: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    assert got.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert_same_bits(got[key], tensor, f"{what}: {key}")


def covering(*columns: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows that hold every pair of values of every two columns at least once, chosen greedily."""
    pairs = {((i, x), (j, y)) for (i, a), (j, b) in itertools.combinations(enumerate(columns), 2) for x in range(len(a))
             for y in range(len(b))}
    rows = []
    candidates = list(itertools.product(*(range(len(column)) for column in columns)))
    while pairs:
        held = {row: pairs & {((i, row[i]), (j, row[j])) for i, j in itertools.combinations(range(len(row)), 2)}
                for row in candidates}
        best = max(candidates, key=lambda row: len(held[row]))
        pairs -= held[best]
        rows.append(tuple(column[i] for column, i in zip(columns, best, strict=True)))
    return rows
