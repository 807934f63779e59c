"""Clipping by a norm without rewriting a gradient: the coefficient enters the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fasttrain.kernels import norm
from fasttrain.optim.local import local, shares, total_of_shards

if TYPE_CHECKING:
    from fasttrain.optim.optimizer import Optimizer


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
    square = total_of_shards(grad) if shares(grad) else norm.squares([local(grad)])[0][0]
    return coefficient(scale * math.sqrt(square.item()), largest)


@torch.no_grad()
def grad_norm(optimizers: Iterable[Optimizer], norm_type: float = 2.0) -> Tensor:
    """The norm of all gradients of the optimizers' parameters together, each parameter counted once.

    Gradients that are shards (DTensor) are summed over the shards, copies are counted once.

    Returns:
        float32, shape (), on the device of the first gradient.
    """
    grads = list({id(p): p.grad for optimizer in optimizers for group in optimizer.param_groups
                  for p in group["params"] if p.grad is not None}.values())
    if not grads:
        return torch.zeros(())
    if norm_type != 2.0 or any(grad.layout != torch.strided for grad in grads):
        return torch.nn.utils.get_total_norm(grads, norm_type)
    sums = []
    for device in dict.fromkeys(grad.device for grad in grads):
        here = [grad for grad in grads if grad.device == device]
        whole = [grad for grad in here if not shares(grad)]
        if whole:
            sums.append(norm.total(norm.squares([local(grad) for grad in whole])[0]).to(grads[0].device))
        sums += [total_of_shards(grad).to(grads[0].device) for grad in here if shares(grad)]
    return norm.total(torch.stack(sums)).sqrt().float()


def clip_grad_norm(optimizers: Iterable[Optimizer], max_norm: float, norm_type: float = 2.0,
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
