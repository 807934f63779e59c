"""Which parameters a reducer takes, and that no other has them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakTensorKeyDictionary

from fasttrain.dist.mesh import Mesh

_owners = WeakTensorKeyDictionary()  # of weak references to reducers


def trained(params: Iterable[Tensor] | Iterable[tuple[str, Tensor]], mesh: Mesh | None = None,
            ) -> list[tuple[str, Tensor]]:
    """The parameters that are trained, each once, with their names.

    Arguments:
        mesh: over which DTensors may be divided; a stage of its pipeline may have no parameter.

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
    if not named and (mesh is None or mesh.sizes["pipeline"] == 1):
        raise RuntimeError("no parameter requires a gradient: there is nothing to reduce")
    for p, name in named.items():
        first = next(iter(named))
        _check(name, p, first, named[first], mesh is not None)
    return [(name, p) for p, name in named.items()]


def check_memory(named: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ValueError for parameters without values."""
    if empty := [name for name, p in named if p.is_meta]:
        raise ValueError(f"{empty[0]} is on meta, and has no gradient to be reduced: give the model its values first, "
                         "by fasttrain.parallel.building.materialize or load_pretrained, and wrap it then")


def _check(name: str, p: Tensor, first: Tensor, first_name: str, divided: bool) -> None:
    if isinstance(p, DTensor) and not divided:
        raise ValueError(f"{name} is a DTensor, divided over some ranks: give the Mesh on which they are "
                         "(fasttrain.parallel.Mesh), so that its gradient is added up over the others")
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
