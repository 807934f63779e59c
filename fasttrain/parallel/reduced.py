"""Which parameters a reducer takes, and that no other has them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakTensorKeyDictionary

_owners = WeakTensorKeyDictionary()  # of weak references to reducers


def trained(params: Iterable[Tensor] | Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """The parameters that are trained, each once, with their names.

    Raises:
        TypeError: something is no tensor, or one that has no flat gradient.
        ValueError: they are on several devices, or another reducer has one of them.
        RuntimeError: there is none.
    """
    named: dict[Tensor, str] = {}
    given: Iterable[Any] = params
    for index, one in enumerate(given):
        name, p = (f"parameter {index}", one) if isinstance(one, Tensor) else one
        if not isinstance(p, Tensor):
            raise TypeError(f"{name} is a {type(p).__name__}: give parameters, or (name, parameter) pairs")
        if p.requires_grad:
            named.setdefault(p, name)  # tied parameters have the name that comes first
    if not named:
        raise RuntimeError("no parameter requires a gradient: there is nothing to reduce")
    first, *_ = named
    for p, name in named.items():
        _check(name, p, first, named[first])
    return [(name, p) for p, name in named.items()]


def _check(name: str, p: Tensor, first: Tensor, first_name: str) -> None:
    if isinstance(p, DTensor):
        raise ValueError(f"{name} is a DTensor: its gradient is divided over a mesh of its own; reduce local "
                         "parameters, or shard the model over the data axis with torch's fully_shard")
    if p.device != first.device:
        raise ValueError(f"{name} is on {p.device} and {first_name} on {first.device}: a process trains on one device; "
                         "move the model there before it is wrapped")
    if not p.is_leaf:
        raise ValueError(f"{name} is no leaf of the graph: no gradient accumulates in it")
    if not (p.is_floating_point() and p.layout == torch.strided):
        raise TypeError(f"{name} is {p.dtype}, {p.layout}: buckets take dense real parameters")
    if owner_of(p) is not None:
        raise ValueError(f"{name} is reduced already, by another wrapper of the same model: use that one, or let go of "
                         "it with remove()")


def owner_of(p: Tensor) -> Any:
    """The reducer that has a parameter, or None."""
    owner = _owners.get(p)
    return None if owner is None else owner()


def own(params: Iterable[Tensor], reducer: Any) -> None:
    """These parameters have a reducer from now on."""
    for p in params:
        _owners[p] = weakref.ref(reducer)


def disown(params: Iterable[Tensor]) -> None:
    """They have none."""
    for p in params:
        _owners.pop(p, None)
