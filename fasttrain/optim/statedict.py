"""States that go out and come back: what is refused before anything changes, and conversion between storages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fasttrain.optim import kept
from fasttrain.optim.checks import plain
from fasttrain.optim.local import as_whole, is_dtensor, local, part_of, shares, whole_of
from fasttrain.precision.codecs import NUMBER, POSITIVE, array_shapes, code_dtype
from fasttrain.precision.storage import DEFAULTS, describe, is_plain

KEPT = ("master", "state_dtype")  # options that decide which arrays there are


def with_own_options(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict with the optimizer's own storage options where a group of it has none (torch's have none)."""
    groups = state_dict["param_groups"]
    if len(groups) != len(optimizer.param_groups):
        return state_dict  # torch will say so
    own = [{name: group[name] for name in DEFAULTS if name in group} for group in optimizer.param_groups]
    return {**state_dict, "param_groups": [{**mine, **saved} for mine, saved in zip(own, groups, strict=True)]}


def check(optimizer: Any, state_dict: Mapping[str, Any]) -> None:
    """Refuse a state dict that does not fit. What torch checks itself (numbers of groups and parameters) is left to it.

    Raises:
        ValueError: names the parameter or the group, and the remedy.
    """
    groups = optimizer.param_groups
    if len(groups) != len(state_dict["param_groups"]):
        return
    for index, (group, saved) in enumerate(zip(groups, state_dict["param_groups"], strict=True)):
        if len(group["params"]) != len(saved["params"]):
            return
        for option in KEPT:
            same = saved.get(option, DEFAULTS[option]) == group.get(option, DEFAULTS[option])
            if not same and any(state_dict["state"].get(n) for n in saved["params"]):
                raise ValueError(f"group {index} of the state dict was kept with {describe(saved)}, the optimizer's "
                                 f"with {describe(group)}: convert it first, "
                                 "optimizer.load_state_dict(fasttrain.optim.convert(state_dict, optimizer))")
        for place, saved_at in enumerate(saved["params"]):
            state = state_dict["state"].get(saved_at)
            if state:
                optimizer.check_loaded((index, place), {**group, **saved, "params": group["params"]}, state)


def check_state(name: str, shapes: Mapping[str, tuple[int, ...] | None], optional: set[str],
                state: Mapping[str, Any]) -> None:
    """Refuse entries that are missing, unknown or of another shape.

    Arguments:
        shapes: of what the optimizer keeps for the parameter, by name; None: of any shape.
        optional: names that are made anew if they are missing, or may be None.

    Raises:
        ValueError: names the parameter and the entry.
    """
    remedy = "is this the state dict of another optimizer, or of another model?"
    if missing := [key for key in shapes if state.get(key) is None and key not in optional]:
        raise ValueError(f"{name}: the state dict has no {', '.join(map(repr, missing))} for it (it has "
                         f"{', '.join(map(repr, state))}): {remedy}")
    if unknown := [key for key in state if key not in shapes]:
        raise ValueError(f"{name}: the state dict has {', '.join(map(repr, unknown))} for it, which the optimizer does "
                         f"not keep (it keeps {', '.join(map(repr, shapes))}): {remedy}")
    for key, value in state.items():
        shape = shapes[key]
        if shape is not None and isinstance(value, Tensor) and tuple(value.shape) != shape:
            raise ValueError(f"{name}: its state {key!r} has shape {tuple(value.shape)} in the state dict; it must be "
                             f"{shape}: {remedy}")


# --- Shards -----------------------------------------------------------------------------------------------------------

def consolidate(state_dict: Any, device: torch.device | str | None = None, only_first: bool = False) -> Any:
    """A state dict whose sharded tensors (DTensor) are whole, of any dtype: the remainders of split masters too.

    torch's own way (`StateDictOptions(full_state_dict=True)`) gathers what the collectives know, and they know no
    int16. One tensor after the other is gathered, byte by byte, and every process has to call this. `distribute` is the
    way back.

    Arguments:
        state_dict: of an optimizer or a model, as their `state_dict` or `torch.distributed.checkpoint.state_dict` give
            it: dicts, lists and tuples, to any depth, alike on every process.
        device: where the tensors go, each as soon as it is whole; None: they stay.
        only_first: only the process of rank 0 keeps anything; the others get an empty dict.

    Returns:
        New dicts and lists with new, plain tensors.

    Example:
        >>> from fasttrain.optim import SGD, consolidate
        >>> weight = torch.nn.Parameter(torch.ones(2))  # on one process nothing is sharded
        >>> consolidate(SGD([weight], lr=0.1).state_dict())["state"]
        {}
    """
    drop = only_first and torch.distributed.is_initialized() and torch.distributed.get_rank() > 0
    whole = _consolidated(state_dict, device, drop)
    return {} if drop else whole


def distribute(state_dict: Any, like: Any) -> Any:
    """A full state dict with every tensor cut as in another one, that of the sharded run. Nothing is sent.

    Arguments:
        state_dict: from `consolidate` or from a run that is not sharded; every process has all of it.
        like: of the model or optimizer that is to load it, from the same function. An optimizer that has not stepped
            has no state to cut by: `torch.distributed.checkpoint.state_dict.get_optimizer_state_dict` makes one.

    Returns:
        New dicts and lists with new tensors; those that are sharded in `like` are DTensors.

    Raises:
        ValueError: a tensor has another shape than that of `like`.

    Example:
        >>> from fasttrain.optim import distribute
        >>> distribute({"state": {"w": torch.ones(2)}}, {"state": {"w": torch.zeros(2)}})  # which is not sharded
        {'state': {'w': tensor([1., 1.])}}
    """
    if isinstance(state_dict, Mapping) and isinstance(like, Mapping):
        return {key: distribute(value, like.get(key)) for key, value in state_dict.items()}
    if isinstance(state_dict, (list, tuple)) and isinstance(like, (list, tuple)) and len(like) == len(state_dict):
        return type(state_dict)(distribute(one, other) for one, other in zip(state_dict, like, strict=True))
    if not isinstance(state_dict, Tensor):
        return state_dict
    if not is_dtensor(like):
        return state_dict.clone()
    if state_dict.shape != like.shape:
        raise ValueError(f"the full state dict has a tensor of shape {tuple(state_dict.shape)} where the sharded one "
                         f"has {tuple(like.shape)}: is it of another model, or kept by other storage options?")
    return as_whole(part_of(state_dict.detach(), like).clone().to(like.device), like)


def _consolidated(entry: Any, device: torch.device | str | None, drop: bool) -> Any:
    if isinstance(entry, Mapping):  # every process in one order, whatever was made first on each
        done = {key: _consolidated(entry[key], device, drop) for key in sorted(entry, key=str)}
        return {key: done[key] for key in entry}
    if isinstance(entry, (list, tuple)):
        return type(entry)(_consolidated(one, device, drop) for one in entry)
    if not isinstance(entry, Tensor):
        return entry
    whole = whole_of(entry) if shares(entry) else local(entry.detach()).clone()
    return None if drop else whole.to(device) if device is not None else whole


# --- Conversion -------------------------------------------------------------------------------------------------------

def convert(state_dict: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A state dict of the same optimizer under other storage options, as `optimizer` keeps its states.

    Arguments:
        state_dict: of an optimizer of this package or of torch, with the same parameters in the same order.
        optimizer: where it is to be loaded: of this package with any storage options, or torch's. Its parameters must
            have the weights that belong to the state (load the model first).

    Returns:
        A new state dict; `state_dict` is unchanged. Masters and remainders are exact; states lose what the new codec
        loses. For torch, states are fp32 and everything that torch does not keep is left out.

    Raises:
        ValueError: the parameters are not as many as those of the state dict.

    Example:
        >>> from fasttrain.optim import AdamW, convert
        >>> weight = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
        >>> old, new = AdamW([weight]), AdamW([weight], master="split", state_dtype="bf16")
        >>> weight.grad = torch.ones(8, dtype=torch.bfloat16)
        >>> old.step()
        >>> new.load_state_dict(convert(old.state_dict(), new))
    """
    if (host := getattr(optimizer, "_on_host", lambda: None)()) is not None:
        optimizer = host.as_it_is()
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    if [len(group["params"]) for group in groups] != [len(saved["params"]) for saved in saved_groups]:
        raise ValueError("the state dict has groups of "
                         f"{', '.join(str(len(saved['params'])) for saved in saved_groups)} parameters, the optimizer "
                         f"of {', '.join(str(len(group['params'])) for group in groups)}")
    ours = hasattr(optimizer, "takes_storage")  # torch's has not
    new_state, new_groups = {}, []
    for group, saved in zip(groups, saved_groups, strict=True):
        own = {name: group[name] for name in DEFAULTS if name in group} if ours else {}
        options = {**{name: value for name, value in saved.items() if name not in DEFAULTS}, **own}
        new_groups.append(options)
        for p, at in zip(group["params"], saved["params"], strict=True):
            if state := state_dict["state"].get(at):
                exact = dict(_exact(p, state))
                new_state[at] = _kept(optimizer, p, {**group, **options, "params": [p]}, exact) if ours else {
                    key: value for key, value in exact.items() if key not in ("master", kept.EMA)}
    return {**state_dict, "state": new_state, "param_groups": new_groups}


def _exact(p: Tensor, state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The entries of a state in full precision: no codes, and a master instead of a remainder or compensation."""
    for key, value in state.items():
        if f"{key}_scale" in state:
            number_ = next(n | flag for n in range(NUMBER["int8"], NUMBER["int4"] + 1) for flag in (0, POSITIVE)
                           if value.dtype == code_dtype(n | flag)
                           and tuple(value.shape) == array_shapes(n, p.shape)[0])
            yield key, kept.values(number_, value.to(p.device), state[f"{key}_scale"].to(p.device), p.shape)
        elif key in ("remainder", "compensation"):
            number_of = {torch.int16: "split16", torch.int8: "split8"}.get(value.dtype)
            name = number_of or ("kahan_bf16" if p.dtype == torch.bfloat16 else "kahan_f16")
            yield "master", kept.values(NUMBER[name], plain(p.detach()), value.to(p.device), p.shape)
        elif not key.endswith("_scale"):
            yield key, value.clone() if isinstance(value, Tensor) else value


def _kept(optimizer: Any, p: Tensor, group: dict[str, Any], exact: dict[str, Any]) -> dict[str, Any]:
    """The entries as the group's options keep them."""
    master = exact.pop("master", None)
    rule = optimizer.rule_of(group)
    if is_plain(group):
        return {key: value for key, value in exact.items() if key != kept.EMA}
    layout = optimizer._layout("a parameter", p, p.dtype, group, rule)
    new = {key: value for key, value in exact.items() if key not in rule.state and key != kept.EMA}
    if layout.extras[0] is not None:
        new[layout.extras[0]] = kept.arrays(layout.codecs[0], p, p.detach() if master is None else master)[1]
    for number_, key, extra in list(zip(layout.codecs, layout.keys, layout.extras, strict=True))[2:]:
        if key in exact:
            new[key], second = kept.arrays(number_, p, exact[key].to(p.device))
            if extra is not None:
                new[extra] = second
    return new
