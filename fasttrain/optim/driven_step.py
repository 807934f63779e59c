"""One step that devices drive: what has to be looked at again, and the launches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from dataclasses import replace
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrain.kernels import dispatch
from fasttrain.optim import drive as driving
from fasttrain.optim import ema
from fasttrain.optim.checks import check_running
from fasttrain.optim.drive import Drive, Found, Place, refused, rules_of
from fasttrain.optim.examine import Examined, counted, kind_of, undone
from fasttrain.optim.groups import lists_of
from fasttrain.optim.local import is_dtensor, local
from fasttrain.optim.prepared import (
    Entry,
    NotDriven,
    Prepared,
    advancing_groups,
    entry,
    first_step_only,
    prepare,
)
from fasttrain.optim.report import StepReport
from fasttrain.optim.roster import roster
from fasttrain.rule import Rule


def step(optimizer: Any, found: Found, rules: list[Rule], report: StepReport) -> bool:
    """Take a step that devices drive; False if they cannot, after all, and nothing was done.

    Raises:
        RuntimeError, ValueError, TypeError: as `Optimizer.step`; or a step cannot be captured.
    """
    drive = optimizer._drive or Drive()
    if drive.roster is None:
        drive.roster = roster(lists_of(optimizer))
    remainders, groups = dict(optimizer._remainders), [dict(group) for group in optimizer.param_groups]
    try:
        with undone(optimizer) as examining:
            ready = _ready(optimizer, drive, found, rules, examining, report)
    except BaseException as error:
        drive.roster = None  # it was told of entries that are not kept
        optimizer._remainders = remainders
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(before)
        if not isinstance(error, NotDriven):
            raise
        if driving.capturing():
            raise refused(error) from None
        return False
    drive.roster.release()
    if found.others:
        drive.found, drive.active = found._replace(others=[]), drive.roster.active()
    drive.vouched = None if driving.capturing() or any(one.watched for one in ready) else optimizer._vouched
    optimizer._drive = drive
    _launch(optimizer, drive, ready, report)
    return True


def _ready(optimizer: Any, drive: Drive, found: Found, rules: list[Rule], examining: Callable[[Tensor], None],
           report: StepReport) -> list[Prepared]:
    """What steps the parameters, with the gradients and the hyperparameters of now."""
    kinds = [kind_of(group, rule) for group, rule in zip(optimizer.param_groups, rules, strict=True)]
    numbers, steps = _numbers(optimizer), dict[int, float]()
    fresh: list[tuple[Tensor, Hashable]] = []
    same = found.places == drive.stepped and all(map(is_, numbers, drive.numbers)) and kinds == drive.kinds
    if not same or found.others:
        others, known = set(found.others), {}
        for index, where in zip(found.indices, found.places, strict=True):
            old = drive.entries.get(where)
            if old is None or index in others or old.kind != kinds[where[0]]:
                same = False
                if driving.capturing():
                    raise NotDriven(f"no step before was driven by the device in which {optimizer._name(where)} had "
                                    "such a gradient, such states and options: take one before the capture, of an "
                                    "optimizer made with capturable=True, or let fasttrain.StepGraph do it")
                examining(optimizer._param(where))
                old = _entry(optimizer, drive, where, index, rules[where[0]], steps, fresh, report)
            known[where] = old
    if same:
        addresses = drive.roster.addresses()
        for one in drive.ready:
            one.update(addresses)
            if not driving.capturing():
                one.refresh(optimizer)
        return drive.ready
    if driving.capturing():
        raise NotDriven("other parameters have gradients than in the step before: take one step with these first"
                        if drive.ready else "the step before was captured too: take one without a graph first")
    drive.cohorts.add(fresh)
    made = _prepared(optimizer, drive, known, steps)
    drive.entries, drive.ready, drive.stepped = {**drive.entries, **known}, made, found.places
    drive.numbers, drive.kinds = _numbers(optimizer), kinds
    return made


def _numbers(optimizer: Any) -> list[Any]:
    """The numbers of groups that steps count."""
    return [group.get(name) for group in optimizer.param_groups for name in ("draws", *optimizer.running_of_groups)]


def _prepared(optimizer: Any, drive: Drive, known: dict[Place, Entry], steps: dict[int, float]) -> list[Prepared]:
    by_device: dict[torch.device, list[Entry]] = {}
    at: dict[torch.device, list[int]] = {}
    for place, one in enumerate(known.values()):
        by_device.setdefault(one.item.tensors[0].device, []).append(one)
        at.setdefault(one.item.tensors[0].device, []).append(place)
    counters = [drive.once.get(id(one.p), one.item.counter) for one in known.values()]
    drive.cohorts.split([counter for counter in counters if counter is not None])
    backends = {device: dispatch.choose(device, optimizer.backend) for device in by_device}
    home = next(iter(by_device))
    for group in optimizer.param_groups:
        for name in optimizer.running_of_groups:
            if not isinstance(group[name], Tensor):
                group[name] = torch.full((), group[name], dtype=torch.float64, device=home)
    made = [prepare(optimizer, entries, {id(one.p): steps.get(id(one.p), 2.0) for one in entries}, drive.once,
                    drive.cohorts, _draws(optimizer, drive, device, entries),
                    backends[device], np.array(at[device]) if len(at) > 1 else None)
            for device, entries in by_device.items()]
    if optimizer.running_of_groups:
        advancing_groups(optimizer, made[0], backends[home])
    return made


def _entry(optimizer: Any, drive: Drive, where: Place, index: int, rule: Rule, steps: dict[int, float],
           fresh: list[tuple[Tensor, Hashable]], report: StepReport) -> Entry:
    """Examine a parameter, and put its counts where the device has them."""
    p, name = optimizer._param(where), optimizer._name(where)
    one: Examined = optimizer._examine(where, rule, report, drive.steps_of)
    grad = local(p.grad)
    if grad.is_neg() or grad.is_conj():
        raise NotDriven(f"{name} has a gradient that is a conjugated or negated view")
    state, item = optimizer.state[p], one.item
    device = item.tensors[0].device
    values = []
    for key in optimizer.running:
        check_running(name, key, state)
        if item.counter is None or item.counter not in drive.cohorts:
            values.append(counted(local(state[key]), report))
            if state[key].device != device:
                state[key] = torch.full_like(state[key], values[-1], device=device)
    if item.counter is not None:
        if item.counter not in drive.cohorts:
            if item.counter.device != device or is_dtensor(state["step"]):
                state["step"] = torch.full((), one.step - 1, dtype=item.counter.dtype, device=device)
            counter: Tensor = local(state["step"])
            item = replace(item, counter=counter)
            fresh.append((counter, (one.step, *values)))
    elif first_step_only(rule, optimizer.counts_steps):
        steps[id(p)] = one.step
        if one.step == 1:
            drive.once[id(p)] = torch.zeros((), device=device)
            fresh.append((drive.once[id(p)], "first"))
    else:
        steps[id(p)] = 1.0
    made = entry(where, p, kind_of(optimizer.param_groups[where[0]], rule), item, name, one.kept)
    keys = tuple(key for key in state if isinstance(state[key], Tensor))
    drive.roster.set(index, state, keys, zero=item.zero, watched=made.watched)
    return made


def _draws(optimizer: Any, drive: Drive, device: torch.device, entries: list[Entry]) -> dict[int, Tensor]:
    """The counts of draws of the groups on a device; the first device's are those in the groups."""
    counts = {}
    for index in {one.where[0] for one in entries}:
        group = optimizer.param_groups[index]
        if "draws" not in group:
            continue
        value = group["draws"]
        if not isinstance(value, Tensor):
            group["draws"] = value = torch.full((), value, dtype=torch.int64, device=device)
        elif value.device != device:
            value = drive.draws.setdefault((index, device), value.to(device, copy=True))
        counts[index] = value
    return counts


def _launch(optimizer: Any, drive: Drive, ready: list[Prepared], report: StepReport) -> None:
    """Queue the step; from here on nothing is refused."""
    told = (getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None),
            *(optimizer._limit or (None, None)))
    if driving.capturing():
        _warn_frozen(optimizer, drive)
        drive.captured += ready
        drive.ready, drive.stepped = [], []
    report.driven = True
    for one in ready:
        one.tell(*told)
    _rest(optimizer, ready)
    for one in ready:
        one.launch()
        one.remember(optimizer)
        report.launches += one.step.launches
        report.parameters += len(one.entries)
        report.bytes_read += one.traffic[0]
        report.bytes_written += one.traffic[1]
    drive.roster.remember()
    optimizer._close(report)


def _rest(optimizer: Any, ready: list[Prepared]) -> None:
    """What a step does with parameters that it does not step, unless the device skips it."""
    found = ready[0].told[0]
    counted = {spec.group for one in ready for spec in one.specs if spec.draws is not None}
    for index, group in enumerate(optimizer.param_groups):
        if group.get("ema_decay") is not None:
            ema.follow_resting(optimizer, index, found)
        if "draws" in group and index not in counted:
            if not isinstance(group["draws"], Tensor):
                group["draws"] = torch.full((), group["draws"], dtype=torch.int64, device=found.device)
            group["draws"].add_((found == 0).to(group["draws"]))


def _warn_frozen(optimizer: Any, drive: Drive) -> None:
    given = [optimizer._hyperparameters(rule, {**dict.fromkeys(optimizer.running), **group})
             for group, rule in zip(optimizer.param_groups, rules_of(optimizer), strict=True)]
    names = sorted({name for values in given for name, value in values.items()
                    if any(isinstance(one, float) for one in (value if isinstance(value, tuple) else (value,)))})
    if names and not drive.replayed and not drive.captured:
        warnings.warn(f"{', '.join(names)} of {type(optimizer).__name__} are Python numbers, and a CUDA graph is being "
                      "captured: its replays go on with the values of now until optimizer.refresh() is called. Use "
                      "fasttrain.StepGraph, which calls it, or give tensors on the device", UserWarning, stacklevel=6)
