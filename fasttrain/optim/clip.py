"""Clipping by a norm without rewriting a gradient: the coefficient enters the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fasttrain.kernels import norm
from fasttrain.optim import wider
from fasttrain.optim.local import local, norm_of_parts, settle, shares, statistics_of_parts

PLAIN = (Tensor, torch.nn.Parameter, type(None))  # types that are no DTensor; asking a type is faster than isinstance


def coefficient(total: float, largest: float | None) -> float:
    """What brings a norm down to `largest`, as torch computes it; 1 if it is not larger, or if there is no limit.

    >>> coefficient(4.0, 2.0)
    0.49999987500003124
    """
    if largest is None:
        return 1.0
    scale = largest / (total + 1e-6)
    return scale if not scale >= 1.0 else 1.0  # NaN stays NaN


class Clipped:
    """What an optimizer keeps of `clip_grad_norm_` until its next step."""

    _coefficient: float = 1.0  # what the next step multiplies the gradients with, where the host knows it
    _limit: tuple[Tensor, float] | None = None  # or the norm of the gradients, and what the step clips it to
    _syncs: int = 0  # waits for a device since the last step

    @property
    def _clip(self) -> float:
        """What the next step multiplies the gradients with, on the host: the coefficient of `clip_grad_norm_`."""
        if self._limit is None:
            return self._coefficient
        self._syncs += self._limit[0].device.type != "cpu"
        return coefficient(self._limit[0].item(), self._limit[1])

    @_clip.setter
    def _clip(self, coefficient: float) -> None:
        self._coefficient, self._limit = coefficient, None


def coefficient_of_one(p: Tensor, scale: float, largest: float | None) -> float:
    """The coefficient for one parameter's own gradient, which the step multiplies with `scale` as well."""
    if p.grad is None or largest is None:
        return 1.0
    squares, _ = statistics_of_parts([p]) if shares(p) else norm.squares([local(p.grad)])
    return coefficient(scale * math.sqrt(squares[0].item()), largest)


def parameters(optimizers: Iterable[Any]) -> list[Tensor]:
    """All parameters of the optimizers that are trained, each once; their gradients are placed as they are."""
    params = list({id(p): p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]
                   if p.requires_grad or p.grad is not None}.values())
    for p in placed(params):
        settle(p)
    return params


def everything(optimizers: Iterable[Any]) -> list[Tensor]:
    """All parameters, frozen ones too: what a stage of a pipeline without any other is known by."""
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def in_shards(optimizer: Any) -> bool:
    """Whether ranks have shards of the gradients, which no parameter shows (`fasttrain.parallel.Zero`)."""
    return getattr(optimizer, "in_shards", False)


def placed(params: Iterable[Tensor]) -> list[Tensor]:
    """Those that may be DTensors, or have one for a gradient."""
    return [p for p in params if type(p) not in PLAIN or type(p.grad) not in PLAIN]


@torch.no_grad()
def statistics(optimizers: Iterable[Any], each: list[tuple[list[Tensor], Tensor]] | None = None,
               ) -> tuple[Tensor, Tensor]:
    """The sum of squares of all gradients, float64, and whether any element is infinite or NaN; both of shape ().

    Gradients that are shards (DTensor) are added over the processes, copies are counted once.

    Arguments:
        each: gets the parameters and the sums of squares of each, float64, as they are made by the same pass; not of
            optimizers that have gradients in shards.
    """
    optimizers = list(optimizers)
    shown = [optimizer for optimizer in optimizers if not in_shards(optimizer)]
    params = parameters(shown)
    if (widened := wider.declared(params or everything(shown))) is not None:
        given = [p for p in params if p.grad is not None]
        squares, bad = norm.squares([local(p.grad) for p in given])
        if each is not None:
            each.append((given, squares))
        return widened(given, squares, bad)
    cut = [p for p in placed(params) if shares(p)]  # with those that have no gradient here: others may have one
    apart = {id(p) for p in cut}
    by_device: dict[torch.device, list[Tensor]] = {}
    owners: dict[torch.device, list[Tensor]] = {}
    for p in params:
        grad = p.grad
        if grad is not None and id(p) not in apart:
            grad = local(grad) if type(grad) not in PLAIN else grad
            by_device.setdefault(grad.device, []).append(grad.coalesce().values() if grad.is_sparse else grad)
            owners.setdefault(grad.device, []).append(p)
    sums, found = [], []
    for optimizer in filter(in_shards, optimizers):
        squares, bad = optimizer.grad_statistics()
        sums.append(squares)
        found.append(bad)
    made = []
    for device, grads in by_device.items():
        squares, bad = norm.squares(grads)
        made.append((owners[device], squares))
        sums.append(norm.total(squares))
        found.append(bad)
    if cut:
        squares, bad = statistics_of_parts(cut)
        made.append((cut, squares))
        sums.append(norm.total(squares))
        found.append(bad)
    if each is not None:
        each += made
    if not sums:
        return torch.zeros((), dtype=torch.float64), torch.tensor(False)
    home = sums[0].device
    return norm.total(torch.stack([part.to(home) for part in sums])), torch.stack([bad.to(home) for bad in found]).any()


def grad_norm(optimizers: Iterable[Any], norm_type: float = 2.0) -> Tensor:
    """The norm of all gradients of the optimizers' parameters together, each parameter counted once.

    Returns:
        float32, shape (), on the device of the first gradient.
    """
    optimizers = list(optimizers)
    if norm_type != 2.0 and any(map(in_shards, optimizers)):
        raise ValueError(f"norm_type={norm_type}: of gradients in shards the norm 2 is known, and no other")
    if norm_type == 2.0:
        return statistics(optimizers)[0].sqrt().float()
    params = parameters(optimizers)
    if wider.declared(params or everything(optimizers)) is not None:
        raise ValueError(f"norm_type={norm_type}: over a mesh the norm 2 of a model is known, and no other")
    params = [p for p in params if p.grad is not None]
    norms = [norm_of_parts(p, norm_type) for p in params if shares(p)]
    if not norms:
        return torch.nn.utils.get_total_norm([local(p.grad) for p in params], norm_type)
    rest = torch.nn.utils.get_total_norm([local(p.grad) for p in params if not shares(p)], norm_type)
    return torch.linalg.vector_norm(torch.stack([*norms, rest.to(norms[0])]), norm_type).float()


def clip_grad_norm(optimizers: Iterable[Any], max_norm: float, norm_type: float = 2.0,
                   error_if_nonfinite: bool = False, norm: Tensor | None = None) -> Tensor:
    """Scale the gradients of the next step of each optimizer so that their total norm is at most `max_norm`.

    The gradients themselves are read once and not rewritten: `torch.nn.utils.clip_grad_norm_` reads them twice and
    writes them. Call it between backward and step; the coefficient holds for one step, also if that is skipped.

    Arguments:
        optimizers: of this package; their parameters count as one vector.
        max_norm: the largest norm that is let through.
        norm_type: of the norm; 2 is one pass of ours, others go through torch.
        error_if_nonfinite: raise if the norm is infinite or NaN; this waits for the device, which nothing else does.
        norm: that of all gradients, where it is known, as to `fasttrain.parallel.Reducer.grad_norm`: none is read.

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
    total = grad_norm(optimizers, norm_type) if norm is None else norm
    if error_if_nonfinite and not math.isfinite(total.item()):
        raise RuntimeError(f"the norm of the gradients is {total.item()}: nothing was clipped")
    for optimizer in optimizers:
        optimizer._limit = total.clone(), max_norm  # a copy: what is returned may be written
    return total
