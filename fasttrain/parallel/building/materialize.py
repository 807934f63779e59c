"""Models built on meta get memory and values, each process its own part only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn

from fasttrain.optim.local import local
from fasttrain.parallel.building.buffers import build_all, builders_of
from fasttrain.parallel.building.defaults import Rules, rules_of
from fasttrain.parallel.building.places import indices
from fasttrain.parallel.building.rules import Rule, key_of
from fasttrain.parallel.building.tensors import Held, device_for, held, replace
from fasttrain.parallel.wrapped import bare

M = TypeVar("M", bound=nn.Module)


def materialize(model: M, *, seed: int, rules: Rules | None = None, device: torch.device | str | None = None,
                tied: Mapping[str, str] | None = None, everything: bool = False) -> M:
    """Give every parameter and buffer that is on meta memory for its local part, and its first values.

    A value depends on the seed, the parameter's name in the original model and its row-major index in the whole
    parameter, and on nothing else: weights have the same bits for any mesh, placement, split into stages and device.
    Nothing is sent, and no process ever holds more of a parameter than its part.

    What is plain, a DTensor (by `parallelize_module`, `tensor_parallel`) or cut by `fully_shard` may be on meta; tied
    parameters stay one. The rule of a parameter is the first that is found:

    1. in `rules`;
    2. in what ``initial()`` returns, of the whole model or of a module in it, a dict from patterns to rules too;
       models of transformers have those of their `_init_weights`;
    3. by the class of its module: the distributions of torch's `reset_parameters`.

    Buffers outside of the state dict (rotary tables) are computed anew: a module that has such ones, or one that holds
    it, has a method ``build_buffers()``, which assigns them all and is called with `device` as torch's default.

    Arguments:
        model: changed in place. Parameters are replaced by new ones: make optimizers and `DataParallel` afterwards.
        seed: the same on every rank.
        rules: {pattern of names, as of `fnmatch`: rule}; the first that fits counts.
        device: None: that of a DTensor's mesh, else the CPU.
        tied: names by the name that they are tied to, for stages that have lost one of the two; None: what the model
            says in its attribute `tied`.
        everything: parameters that are not on meta get values too, in place.

    Returns:
        The model.

    Raises:
        ValueError: a parameter or buffer has no rule, all of which are named; nothing was changed.
        TypeError: a rule is none.

    Example:
        >>> from fasttrain.parallel.building import Zeros
        >>> with torch.device("meta"):
        ...     model = nn.Sequential(nn.Embedding(1000, 64), nn.Linear(64, 10))
        >>> model = materialize(model, seed=0, rules={"1.bias": Zeros()})
        >>> model[0].weight.std(), model[1].bias.sum()
        (tensor(0.9965, grad_fn=...), tensor(0., grad_fn=...))
    """
    found = [one for one in held(model, tied) if one.on_meta or (everything and one.is_parameter)]
    chosen = rules_of(model, found, rules)
    computed = [one for one in found if chosen[one.name] is None and not one.is_parameter]
    builders = builders_of(bare(model), computed)
    check(found, chosen, builders)
    where = torch.device(device) if device is not None else None
    with torch.no_grad():
        for one in found:
            if (rule := chosen[one.name]) is not None:
                fill(one, rule, key_of(seed, one.name), where)
        build_all(computed, builders, where)
    return model


def fill(one: Held, rule: Rule, key: int, device: torch.device | None) -> None:
    """Draw a tensor's local part, in new memory if it is on meta."""
    part = local(one.tensor)
    device = device_for(one, device) if one.on_meta else part.device
    out = torch.empty_like(part, device=device) if one.on_meta else part
    rows = out if out.is_contiguous() else torch.empty(part.shape, dtype=part.dtype, device=device)
    for at, places in indices(one.tensor, device):
        rows.view(-1)[at] = rule.values(key, places, part.dtype)
    if rows is not out:
        out.copy_(rows)
    if one.on_meta:
        replace(one, out)


def check(found: list[Held], chosen: Mapping[str, Rule | None], builders: Mapping[str, nn.Module]) -> None:
    """Raise if a tensor would have no values."""
    lines = []
    for one in found:
        if chosen[one.name] is not None or one.name in builders:
            continue
        module = type(one.sites[0][0]).__name__
        if one.is_parameter:
            tied = f", tied to {one.name}, which is not here" if one.absent else ""
            lines.append(f"parameter {one.names[0]} {tuple(one.tensor.shape)} of {module}{tied}: rules="
                         f"{{{one.name!r}: Normal(0.02)}}, or a method initial() of the model")
        else:
            lines.append(f"buffer {one.names[0]} {tuple(one.tensor.shape)} of {module}: a method build_buffers() of "
                         "the module, or a rule, or make it outside of torch.device('meta')")
    if lines:
        raise ValueError(f"{len(lines)} tensors on meta would have no values:\n  " + "\n  ".join(lines))
