"""What tests of storage options share: bf16 parameters, their gradients, and comparisons of states of any dtype."""

from __future__ import annotations

from typing import Any

import torch
from helpers import assert_same_bits, generator
from torch import Tensor
from torch.nn import Parameter


def parameters(dtype: torch.dtype = torch.bfloat16, sizes: tuple[Any, ...] = ((90, 64), (5,))) -> list[Parameter]:
    numbers = generator(3)
    return [Parameter(torch.randn(size, generator=numbers).bfloat16().to(dtype)) for size in sizes]


def give_gradients(params: list[Parameter], step: int, scale: float = 1.0) -> None:
    numbers = generator(100 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=numbers).bfloat16() * scale).to(p.dtype)


def run(params: list[Parameter], optimizer: Any, steps: int, first: int = 0) -> list[Tensor]:
    for step in range(first, first + steps):
        give_gradients(params, step)
        optimizer.step()
    return [p.detach().clone() for p in params]


def states(optimizer: Any, params: list[Parameter]) -> list[dict[str, Tensor]]:
    return [{key: value.clone() for key, value in optimizer.state[p].items()} for p in params]


def same(a: Any, b: Any, what: str) -> None:
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        if isinstance(x, dict):
            assert x.keys() == y.keys()
            for key in x:
                assert x[key].dtype == y[key].dtype, f"{what}: {key}"
                assert torch.equal(x[key].reshape(-1).view(torch.uint8), y[key].reshape(-1).view(torch.uint8)), \
                    f"{what}: {key} of parameter {i}"
        else:
            assert_same_bits(x, y, f"{what}: parameter {i}")
