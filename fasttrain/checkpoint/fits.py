"""Whether what was saved of an optimizer is of the shapes, dtypes and storages of one that is here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fasttrain.checkpoint.parts import BY_NAME, DTYPES
from fasttrain.checkpoint.problems import LISTED
from fasttrain.checkpoint.saved import Saved
from fasttrain.optim import Optimizer, statedict
from fasttrain.parallel import Zero
from fasttrain.precision.codecs import code_dtype, codec
from fasttrain.precision.storage import is_plain


def numbered(optimizer: Any, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Options of groups as a state dict has them: with the numbers of the optimizer's parameters."""
    found, start = [], 0
    for group, options in zip(optimizer.param_groups, groups, strict=True):
        found.append({**options, "params": list(range(start, start + len(group["params"])))})
        start += len(group["params"])
    return found


def meta(one: Mapping[str, Any], saved: Saved) -> Tensor:
    """What refers to a tensor as one without memory."""
    kind = saved.kinds[one["name"]]
    return torch.empty(kind.shape, dtype=BY_NAME[kind.dtype], device="meta")


def different_shapes(key: str, params: Mapping[str, Any], states: Mapping[str, Any], saved: Saved) -> list[str]:
    """States of torch's optimizers that had the shape of their parameter (L-BFGS's are flat), which is another.

    Arguments:
        key: of the entry.
        params: by name.
        states: what was told of them, by the names of parameters.
    """
    found: list[str] = []
    for name, p in params.items():
        for path, one in states.get(name, {}).items():
            if isinstance(one, Mapping) and "name" in one and (shape := saved.kinds[one["name"]].shape) != p.shape \
                    and (one.get("like") or (len(shape) == p.dim() and math.prod(shape) == p.numel() > 1)):
                found.append(f"{key}: {name}: its state {path!r} has shape {shape} in the checkpoint, the "
                             f"parameter {tuple(p.shape)}")
    return found[:LISTED]


def check(optimizer: Any, names: Mapping[int, str], metas: Mapping[int, Any], groups: list[dict[str, Any]]) -> None:
    """Refuse shapes, dtypes and storages that are not this optimizer's; torch's own are not looked at.

    Arguments:
        names: of its parameters, by their ids.
        metas: states by the numbers of parameters, without memory.
        groups: the options of its groups.

    Raises:
        ValueError: which.
    """
    pattern: Any = optimizer._pattern if isinstance(optimizer, Zero) else optimizer
    if not isinstance(pattern, Optimizer):
        return
    try:
        statedict.check(pattern, {"state": dict(metas), "param_groups": numbered(optimizer, groups)})
    except ValueError as error:
        raise ValueError(f"{error} Nothing is converted on the way: load it into an optimizer of the options that "
                         "it was saved with, and convert that one's state dict") from error
    places = [((g, i), p) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])]
    for number, (where, p) in enumerate(places):
        if number not in metas:
            continue
        for key, wanted in _dtypes(pattern, where, p).items():
            value = metas[number].get(key)
            if isinstance(value, Tensor) and value.dtype != wanted:
                raise ValueError(f"{names[id(p)]}: its state {key!r} is {DTYPES[value.dtype]} in the "
                                 f"checkpoint and {DTYPES[wanted]} here: it was kept by other storage options")


def _dtypes(pattern: Any, where: tuple[int, int], p: Any) -> dict[str, torch.dtype]:
    """What the storage options keep of a parameter, and in which dtypes."""
    group = pattern.param_groups[where[0]]
    if is_plain(group) or not pattern.takes_storage(group):
        return {}
    layout = pattern._layout("a parameter", pattern._param(where), p.dtype, group, pattern.rule_of(group))
    found: dict[str, torch.dtype] = {}
    for number, key, extra in zip(layout.codecs, layout.keys, layout.extras, strict=True):
        if key is not None:
            found[key] = code_dtype(number)
        if extra is not None:
            second = codec(number).extra
            assert second is not None
            found[extra] = second
    return found
