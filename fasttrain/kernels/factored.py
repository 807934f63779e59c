"""Steps whose second moment is kept as row and column means of squares: what Adafactor is made of.

For a parameter with at least two dimensions, whose last two are the rows and columns of a matrix:

1. the means over columns and over rows of the squared gradient move the states ``row_var`` and ``col_var``;
2. ``v = row_var col_var / max(mean(row_var), eps1)`` stands for the second moment, and the update is
   ``u = g / sqrt(max(v, eps1^2))``;
3. ``p = keep p - rho max(eps2, rms(p)) / max(1, rms(u) / d) u``, with the root mean square of p before the step.

Other parameters keep the whole second moment, ``variance``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fasttrain.kernels import dispatch, native
from fasttrain.kernels.item import Item
from fasttrain.kernels.reference import SMALLEST_NORMAL, square_root

# An item (p, g, then row_var and col_var, or variance; its rule is not used) and seven numbers: the gradient's scale,
# what p is multiplied with, the weight of the new squares, rho, eps1, eps2 and d.
Work = tuple[Item, Sequence[float]]


def step(works: Sequence[Work], backend: str) -> None:
    """Step parameters of one device. What a backend has no kernel for runs as `dispatch.choose_from` says."""
    if works:
        dispatch.choose_from(STEPS, backend, works[0][0].tensors[0].device)(works)


def launches(works: Sequence[Work], backend: str) -> int:
    """How many kernels that is, or walks of all."""
    if not works:
        return 0
    chosen = dispatch.choose_from(STEPS, backend, works[0][0].tensors[0].device)
    if chosen in (_cuda, _triton):
        return dispatch.part("cuda_factored" if chosen is _cuda else "triton_factored").launches(works)
    return 1


def step_native(works: Sequence[Work]) -> None:
    """Step tensors in CPU memory by the compiled module: three passes, g and p, g, and both again, which writes p.

    In fp32 they touch 24 bytes an element, of which 8 come from memory where a parameter fits the cache, and 4 go to
    it. torch's foreach implementation touches 80.
    """
    items, copied = [], []
    for item, _ in works:
        walkable = [tensor.contiguous() for tensor in item.tensors]
        copied += [(old, new) for i, (old, new) in enumerate(zip(item.tensors, walkable, strict=True))
                   if i != 1 and new is not old]
        items.append((*walkable[:2], tuple(walkable[2:]), item.counter, item.dtype == torch.float64))
    native.module().step_factored(native.reader(), items, np.array([row for _, row in works]), torch.get_num_threads())
    torch.autograd.graph.increment_version([tensor for item, _ in works for tensor in item.written])
    for old, new in copied:
        old.copy_(new)


def step_reference(works: Sequence[Work]) -> None:
    """The oracle: eager torch, on any device; it does not wait for the device."""
    for item, row in works:
        if item.tensors[0].numel():
            _step_one(item, *row)
        if item.counter is not None:
            item.counter.add_(1)


def _step_one(item: Item, scale: float, keep: float, weight: float, rho: float, eps1: float, eps2: float,
              clip: float) -> None:
    param, gradient, *states = item.tensors
    p, g = param.to(item.dtype), gradient.to(item.dtype)
    squares = (g.double() * scale).square()
    if len(states) == 2:
        means = (squares.mean(-1, keepdim=True), squares.mean(-2, keepdim=True))
        rows, columns = (_moved(state, mean, weight, item.dtype)
                         for state, mean in zip(states, means, strict=True))
        second = rows / rows.mean(-2, keepdim=True).clamp(min=eps1) * columns
    else:
        second = _moved(states[0], squares, weight, item.dtype)
    update = g * scale / square_root(second.to(item.dtype).clamp(min=eps1 * eps1))
    # fmax as Python's max: where one is NaN, the other.
    size = torch.fmax(_rms(param), torch.full_like(_rms(update), eps2)) * rho
    rate = size / torch.fmax(_rms(update) / clip, torch.ones_like(size))
    param.copy_(p * keep - rate.to(item.dtype) * update)


def _moved(state: Tensor, squares: Tensor, weight: float, dtype: torch.dtype) -> Tensor:
    """The running mean, in float64 until it is stored; without denormal numbers."""
    moved = state.double() * (1 - weight) + squares * weight
    moved = torch.where(moved.to(dtype).abs() < SMALLEST_NORMAL[dtype], 0.0, moved)
    state.copy_(moved)
    return moved


def _rms(x: Tensor) -> Tensor:
    return x.double().square().mean().sqrt()


def _triton(works: Sequence[Work]) -> None:
    dispatch.part("triton_factored").step(works)



def _cuda(works: Sequence[Work]) -> None:
    dispatch.part("cuda_factored").step(works)


# By backend; `dispatch.choose_from` says what stands in for one that is not here.
STEPS: dict[str, Callable[..., None]] = {"cuda": _cuda, "triton": _triton, "cpu": step_native,
                                         "reference": step_reference}
