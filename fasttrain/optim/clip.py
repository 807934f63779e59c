"""Clipping by a norm without rewriting a gradient: the coefficient enters the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fasttrain.kernels import norm
from fasttrain.optim.local import local, shares, statistics_of_shards


def coefficient(total: float, largest: float | None) -> float:
    """What brings a norm down to `largest`, as torch computes it; 1 if it is not larger, or if there is no limit.

    >>> coefficient(4.0, 2.0)
    0.49999987500003124
    """
    if largest is None:
        return 1.0
    scale = largest / (total + 1e-6)
    return scale if not scale >= 1.0 else 1.0  # NaN stays NaN


def coefficient_of_one(grad: Tensor | None, scale: float, largest: float | None) -> float:
    """The coefficient for one parameter's own gradient, which the step multiplies with `scale` as well."""
    if grad is None or largest is None:
        return 1.0
    square = statistics_of_shards(grad)[0] if shares(grad) else norm.squares([local(grad)])[0][0]
    return coefficient(scale * math.sqrt(square.item()), largest)


def gradients(optimizers: Iterable[Any]) -> list[Tensor]:
    """The gradients of all parameters of the optimizers, each parameter once."""
    return list({id(p): p.grad for optimizer in optimizers for group in optimizer.param_groups
                 for p in group["params"] if p.grad is not None}.values())


@torch.no_grad()
def statistics(optimizers: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """The sum of squares of all gradients, float64, and whether any element is infinite or NaN; both of shape ().

    Gradients that are shards (DTensor) are added over the processes, copies are counted once.
    """
    grads = gradients(optimizers)
    if not grads:
        return torch.zeros((), dtype=torch.float64), torch.tensor(False)
    home = grads[0].device
    sums, found = [], []
    for device in dict.fromkeys(grad.device for grad in grads):
        whole = [local(grad) for grad in grads if grad.device == device and not shares(grad)]
        if whole:
            squares, bad = norm.squares([grad.coalesce().values() if grad.is_sparse else grad for grad in whole])
            sums.append(norm.total(squares).to(home))
            found.append(bad.to(home))
    for grad in grads:
        if shares(grad):
            square, bad = statistics_of_shards(grad)
            sums.append(square.to(home))
            found.append(bad.to(home))
    return norm.total(torch.stack(sums)), torch.stack(found).any()


def grad_norm(optimizers: Iterable[Any], norm_type: float = 2.0) -> Tensor:
    """The norm of all gradients of the optimizers' parameters together, each parameter counted once.

    Returns:
        float32, shape (), on the device of the first gradient.
    """
    if norm_type == 2.0:
        return statistics(optimizers)[0].sqrt().float()
    return torch.nn.utils.get_total_norm(gradients(optimizers), norm_type)


def clip_grad_norm(optimizers: Iterable[Any], max_norm: float, norm_type: float = 2.0,
                   error_if_nonfinite: bool = False) -> Tensor:
    """Scale the gradients of the next step of each optimizer so that their total norm is at most `max_norm`.

    The gradients themselves are read once and not rewritten: `torch.nn.utils.clip_grad_norm_` reads them twice and
    writes them. Call it between backward and step; the coefficient holds for one step, also if that is skipped.

    Arguments:
        optimizers: of this package; their parameters count as one vector.
        max_norm: the largest norm that is let through.
        norm_type: of the norm; 2 is one pass of ours, others go through torch.
        error_if_nonfinite: raise if the norm is infinite or NaN; this waits for the device.

    Returns:
        The norm before clipping, float32 of shape (), on the gradients' device.

    Raises:
        ValueError: `max_norm` is negative or NaN.
        RuntimeError: parameters are stepped as their gradients arrive, so that there is no norm of all; or the norm is
            not finite and `error_if_nonfinite` is set.
    """
    if not max_norm >= 0.0:
        raise ValueError(f"max_norm is {max_norm}: it must not be negative")
    optimizers = list(optimizers)
    for optimizer in optimizers:
        if optimizer.arriving:
            raise RuntimeError("parameters are stepped as their gradients arrive (step_on_arrival), before the norm of "
                               "all gradients is known: clip each with clip_each= or clip_value=, or step at once")
    total = grad_norm(optimizers, norm_type)
    if error_if_nonfinite and not math.isfinite(total.item()):
        raise RuntimeError(f"the norm of the gradients is {total.item()}: nothing was clipped")
    for optimizer in optimizers:
        optimizer._clip = coefficient(total.item(), max_norm)
        optimizer._syncs += total.device.type != "cpu"
    return total
