"""What ZeRO refuses, and in which words."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from fasttrain.optim.local import local, shares
from fasttrain.parallel import reduced

WIRES = {"same": None, "ordered": None, "bf16": torch.bfloat16}  # in which dtype gradients travel to be added

_stepped_by: WeakIdKeyDictionary = WeakIdKeyDictionary()  # weak references to the `Zero` of a parameter
_known: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()
_hook: Any = None


def reducer_of(params: Sequence[Tensor]) -> Any:
    """The reducer that has all of these parameters, and no others."""
    found = {id(owner): owner for p in params if (owner := reduced.owner_of(p)) is not None}
    if not found:
        raise ValueError("no parameter has a reducer: wrap the model in fasttrain.parallel.DataParallel before Zero")
    if len(found) > 1:
        raise ValueError(f"the parameters are those of {len(found)} wrappers: make one Zero for each")
    (reducer,) = found.values()
    own, given = {id(p) for p in reducer.params}, {id(p) for p in params}
    if extra := len(given - own):
        raise ValueError(f"{extra} trained parameters are not in the wrapper that reduces the others: they would "
                         "differ between ranks; wrap the whole model")
    if missing := [name for name, p in zip(reducer.names, reducer.params, strict=True) if id(p) not in given]:
        more = " and others" if len(missing) > 8 else ""
        raise ValueError(f"{', '.join(missing[:8])}{more}: reduced by the wrapper and not given to Zero, which leaves "
                         "them without a gradient; give all trained parameters")
    if others := [name for name, p in zip(reducer.names, reducer.params, strict=True) if _stepped(p) is not None]:
        raise ValueError(f"{others[0]} is stepped by another Zero already: make one for all parameters, in groups")
    return reducer


def check_wire(reducer: Any) -> torch.dtype | None:
    """The dtype in which gradients travel, None: the buckets' own."""
    if reducer.method.name not in WIRES:
        raise ValueError(f"wire={reducer.method.name!r} makes the mean of whole buckets, which ZeRO does not want: "
                         f"give DataParallel wire={', '.join(map(repr, WIRES))}, a mesh of one dimension, and no "
                         "comm hook")
    return WIRES[reducer.method.name]


def check_memory(params: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raise if different parameters share memory: as views of flat memory they would not any longer."""
    spans = sorted((p.data_ptr(), p.data_ptr() + p.element_size() * (1 + sum(
        (size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))), name)
        for p, name in zip(map(local, params), names, strict=True) if p.numel())
    for (_, end, first), (begin, _, second) in pairwise(spans):
        if begin < end:
            raise ValueError(f"{first} and {second} share memory and are different parameters, which flat memory "
                             "would part: tie them as one parameter (b.weight = a.weight)")


def check_divisible(divided: bool, pattern: Any, params: Sequence[Tensor], names: Sequence[str], cls: Any) -> None:
    """Raise if an optimizer needs whole parameters of which no rank has the whole."""
    cut = [name for name, p in zip(names, params, strict=True) if shares(p)]
    if cut and (pattern is None or not divided):
        what = getattr(cls, "__name__", cls)
        why = "is none of this package" if pattern is None else "does not step every element by itself, as it is used"
        raise ValueError(f"{cut[0]} is cut over several ranks, and {what} {why}: Zero gives it whole parameters, of "
                         "which no rank has any here. Take fasttrain.parallel.shard(model, mesh=mesh) with "
                         "Mesh(shard=...), where it steps shards, or DataParallel with it alone")


def others_refused(zero: Any) -> None:
    """Let any other optimizer raise that steps these parameters: it would find no gradients, and do nothing."""
    global _hook
    for p in zero.reducer.params:
        _stepped_by[p] = weakref.ref(zero)
    _known.clear()
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_before)


def _stepped(p: Tensor) -> Any:
    reference = _stepped_by.get(p)
    return None if reference is None else reference()


def _before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    if _known.get(optimizer) == count:
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            if (zero := _stepped(p)) not in (None, optimizer):
                raise RuntimeError(f"{zero._names[p]} is stepped by a Zero, and a {type(optimizer).__name__} that has "
                                   "it too finds no gradient: make no optimizer of these parameters but Zero(model, "
                                   f"{type(optimizer).__name__}, ...), and step that")
    _known[optimizer] = count
