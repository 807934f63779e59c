"""What tests of steps share: a few small parameters, their gradients, and what a step left of both."""

from collections.abc import Callable
from typing import Any

import torch
from helpers import assert_same_bits, generator, normal
from torch import Tensor
from torch.nn import Parameter

import fasttrain.optim
from fasttrain.optim import ASGD, SGD, Adam, AdamW, Lion, NAdam, Optimizer, ScheduleFreeAdamW

BACKENDS = ["cpu", "reference"]


def parameters(dtype: torch.dtype = torch.float32, sizes: Any = ((5, 3), (8,), ()), seed: int = 3) -> list[Parameter]:
    numbers = generator(seed)
    return [Parameter(normal(size, dtype, numbers)) for size in sizes]


def give(params: list[Parameter], seed: int = 0) -> None:
    numbers = generator(seed)
    for p in params:
        p.grad = normal(p.shape, p.dtype if p.grad_dtype is None else p.grad_dtype, numbers)


def snapshot(params: list[Parameter], optimizer: Optimizer) -> dict[str, Tensor]:
    return {f"{i} {key}": value.detach().clone() for i, p in enumerate(params)
            for key, value in [("p", p), *sorted(optimizer.state.get(p, {}).items())] if isinstance(value, Tensor)}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for key in wanted:
        assert_same_bits(got[key], wanted[key], key)


def reschedule(group: dict[str, Any], step: int) -> None:
    """Hyperparameters of which the running numbers are functions, changed on the way."""
    group["lr"] = 0.1 / (1 + step)
    if "betas" in group:
        group["betas"] = (0.9 - 0.05 * step, 0.99)
        group["momentum_decay"] = 0.01 * (1 + step)
    else:
        group["alpha"], group["lambd"] = 0.5 + 0.05 * step, 0.1 / (1 + step)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "AdamW": lambda params, **kw: AdamW(params, lr=0.1, **kw),
    "SGD": lambda params, **kw: SGD(params, lr=0.1, momentum=0.9, dampening=0.5, **kw),
    "Lion": lambda params, **kw: Lion(params, lr=0.1, **kw),
    "NAdam": lambda params, **kw: NAdam(params, lr=0.1, **kw),
    "ASGD": lambda params, **kw: ASGD(params, lr=0.1, t0=2, **kw),
    "ScheduleFreeAdamW": lambda params, **kw: ScheduleFreeAdamW(params, lr=0.1, **kw),
}
TORCH: dict[type[Optimizer], Any] = {
    ours: getattr(torch.optim, ours.__name__) for ours in (Adam, *fasttrain.optim.OPTIMIZERS)
    if hasattr(torch.optim, ours.__name__)}


def step(optimizer: torch.optim.Optimizer, seed: int) -> None:
    numbers = generator(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.empty_like(p).copy_(normal(p.shape, p.dtype, numbers))  # of the parameter's layout
    optimizer.step()


def ends(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [*params, *(v for p in params for _, v in sorted(optimizer.state.get(p, {}).items()))]


def assert_same_ends(got: torch.optim.Optimizer, wanted: torch.optim.Optimizer) -> None:
    for a, b in zip(ends(got), ends(wanted), strict=True):
        assert_same_bits(a, b)
