"""The oracle: a rule evaluated by eager torch, one operation at a time, on any device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrain.kernels.item import Item
from fasttrain.kernels.trace import trace
from fasttrain.precision.codecs import STOCHASTIC, codec, decode, encode
from fasttrain.precision.draws import full_index, operand_key, random_bits
from fasttrain.rule import Operand, Rule

SMALLEST_NORMAL = {torch.float32: 2.0**-126, torch.float64: 2.0**-1022}


def why_not(device: torch.device) -> str | None:
    """It runs everywhere."""
    return None


class Eager(Operand):
    """A tensor of the rule's element type, or a condition; every operation is computed at once."""

    __slots__ = ("dtype", "tensor")

    def __init__(self, tensor: Tensor, dtype: torch.dtype):
        self.tensor, self.dtype = tensor, dtype

    def apply(self, op: str, *arguments: Any) -> Eager:
        return Eager(OPERATIONS[op](*(self._tensor(argument) for argument in arguments)), self.dtype)

    def _tensor(self, value: Any) -> Tensor:
        if isinstance(value, Eager):
            return value.tensor
        # Scalars become tensors first: torch computes `1.0 / x` as a reciprocal and a product, and on a GPU
        # `x / 2.0` as a product with 0.5, which round differently from one division.
        return torch.full((), float(value), dtype=self.dtype, device=self.tensor.device)


def square_root(x: Tensor) -> Tensor:
    """Correctly rounded, which torch.sqrt on the CPU is not. In fp32 a double root, rounded once more, is."""
    if x.dtype == torch.float32:
        return x.double().sqrt().float()
    if x.device.type == "cpu" and not x.requires_grad:
        with np.errstate(invalid="ignore"):  # a NaN for a negative number is the answer
            return torch.from_numpy(np.sqrt(np.atleast_1d(x.detach().numpy()))).reshape(x.shape)
    return x.sqrt()


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "neg": torch.neg, "abs": torch.abs,
    "sqrt": square_root, "where": torch.where, "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge,
    "eq": torch.eq, "ne": torch.ne, "and": torch.logical_and, "or": torch.logical_or, "not": torch.logical_not,
}


def evaluate(rule: Rule, tensors: Sequence[Tensor], scale: Any, scalars: Mapping[str, Any]) -> list[Tensor]:
    """The new p and states, and the terms of the rule's sums, in the element type; nothing is written.

    Arguments:
        tensors: p, g and states in the element type, of one shape.
        scale: what g is multiplied with.
        scalars: the coefficients, floats or (to differentiate through them) 0-dim tensors.
    """
    dtype = tensors[0].dtype
    inputs = [Eager(tensor, dtype) for tensor in tensors]

    def operand(value: Any) -> Eager:
        return Eager(value.to(tensors[0]) if isinstance(value, Tensor) else inputs[0]._tensor(value), dtype)

    inputs[1] = inputs[1] * operand(scale)
    k = SimpleNamespace(**{name: operand(value) for name, value in scalars.items()})
    outputs = rule.element(*inputs, k)
    new = [output.tensor for output in (outputs if isinstance(outputs, tuple) else (outputs,))]
    zero = torch.zeros((), dtype=dtype, device=new[0].device)
    first_sum = 1 + len(rule.state)
    return [*new[:1], *(torch.where(state.abs() < SMALLEST_NORMAL[dtype], zero, state) for state in new[1:first_sum]),
            *new[first_sum:]]


def step(items: Sequence[Item]) -> None:
    """Step every item."""
    for item in items:
        names = trace(item.rule).coefficients
        scalars = dict(zip(names, item.row[1 : 1 + len(names)], strict=True))
        write(item, item.row[0], scalars)


def write(item: Item, scale: Any, scalars: Mapping[str, Any]) -> None:
    """Step one item with coefficients by name; recorded by autograd where gradients are enabled."""
    if not item.plain:
        return write_kept(item, scale, scalars)
    # Copies where autograd records: it keeps inputs for the backward pass, and they are overwritten below.
    inputs = [tensor.to(item.dtype, copy=torch.is_grad_enabled()) for tensor in item.tensors]
    new = evaluate(item.rule, inputs, scale, scalars)
    p, _, *states = item.tensors
    for tensor, value in zip((p, *states), new, strict=True):
        tensor.copy_(value)
    if item.counter is not None:
        item.counter.add_(1)


def write_kept(item: Item, scale: Any, scalars: Mapping[str, Any]) -> None:
    """Step one item that is not plain: every operand is decoded, and those that are written are encoded."""
    shape = item.tensors[0].shape
    kept = list(zip(item.codecs, item.tensors, item.extras, strict=True))
    values = [decode(number, main, extra, shape.numel()).reshape(shape).to(item.dtype) for number, main, extra in kept]
    p, g, *states = values[: 2 + len(item.rule.state)]
    tail = item.tail
    g = clipped(g * torch.full((), scale, dtype=g.dtype, device=g.device), tail.clip)
    new = evaluate(item.rule, [p, g, *states], 1.0, scalars)
    if item.averaged:
        keep, add = (torch.full((), value, dtype=g.dtype, device=g.device) for value in (tail.keep, tail.add))
        new.append(values[-1] * keep + new[0] * add)
    index = full_index(item.place, shape.numel(), p.device).view(shape)
    for operand, value in zip((0, *range(2, len(kept))), new, strict=True):
        number, main, extra = kept[operand]
        draws = random_bits(operand_key(item.key, operand), index) if number & STOCHASTIC else None
        if codec(number).block:
            value, draws = value.reshape(-1), None if draws is None else draws.view(-1)
        encode(number, value, main, extra, draws)
    if item.zero:
        item.tensors[1].zero_()
    if item.counter is not None:
        item.counter.add_(1)


def clipped(g: Tensor, largest: float) -> Tensor:
    """A scaled gradient whose elements are between -largest and largest; NaN stays NaN."""
    if largest == math.inf:
        return g
    bound = torch.full((), largest, dtype=g.dtype, device=g.device)
    return torch.where(g > bound, bound, torch.where(g < -bound, -bound, g))
