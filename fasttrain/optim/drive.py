"""Steps that devices drive: what an optimizer keeps for them, and when it takes them.

A step on a GPU is driven by it where the host cannot know a number without waiting: the loss scale, what was found in
the gradients, the norm that they are clipped to, or a hyperparameter lies on the device; where ``capturable=True`` asks
for it; and while a CUDA graph is captured. Once driven, an optimizer stays so. Step counts are then on the device, as
torch's capturable optimizers have them, and so are the counts of random draws in the groups.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fasttrain.kernels import dispatch
from fasttrain.optim import ema
from fasttrain.optim.checks import check_running
from fasttrain.optim.cohorts import Cohorts
from fasttrain.optim.examine import Examined, counted, examine, undone
from fasttrain.optim.local import is_dtensor, local, shares, version
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
from fasttrain.precision.storage import is_plain
from fasttrain.rule import Rule

Place = tuple[int, int]  # group, and index in it
ANY = 0.5  # a number that is no special case of any equation


class Drive:
    """What an optimizer keeps for the steps that its devices drive.

    Attributes:
        ready: what took the last step, one for each device.
        captured: those that belong to CUDA graphs.
        outdated: the same, whose states are no longer the optimizer's.
        replayed: somebody refreshes the numbers before every replay, so that Python numbers are not frozen.
    """

    def __init__(self) -> None:
        self.cohorts = Cohorts()
        self.entries: dict[Place, Entry] = {}
        self.ready: list[Prepared] = []
        self.stepped: list[Place] = []  # by `ready`
        self.captured: list[Prepared] = []
        self.outdated: list[Prepared] = []
        self.once: dict[int, Tensor] = {}  # by id of parameters: 0 before their first step, then 1
        self.draws: dict[tuple[int, torch.device], Tensor] = {}
        self.replayed = False

    def steps_of(self, counter: Tensor, report: StepReport) -> float:
        """A step count that is read where it has to be: not that of a parameter that was driven already."""
        return math.nan if counter in self.cohorts else counted(counter, report)


# --- When -------------------------------------------------------------------------------------------------------------

def capturing() -> bool:
    """Whether what is queued now becomes a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def far(value: Any) -> bool:
    """Whether the host would wait for a number."""
    if isinstance(value, (tuple, list)):
        return any(map(far, value))
    return isinstance(value, Tensor) and value.device.type != "cpu"


def asked(optimizer: Any) -> bool:
    """Whether capturable=True asks for driven steps."""
    return optimizer._capturable or any(group.get("capturable") for group in optimizer.param_groups)


def reason(optimizer: Any) -> bool:
    """Whether the next step is better driven by the device."""
    limit = optimizer._limit or ()
    told = (getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None), *limit)
    return optimizer._drive is not None or far(told) or asked(optimizer) or any(
        far(value) for group in optimizer.param_groups for key, value in group.items() if key != "params")


def places(optimizer: Any) -> list[Place] | None:
    """The parameters that have a gradient, if devices can drive all of them and should.

    Raises:
        RuntimeError: a CUDA graph is being captured, and something in the step cannot be.
    """
    captured = capturing()
    if not captured and not reason(optimizer):
        return None
    found = [(g, i) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])
             if p.grad is not None]
    try:
        _check(optimizer, found)
    except NotDriven as why:
        if captured:
            raise refused(why) from None
        return None
    return found or None


def refused(why: NotDriven) -> RuntimeError:
    return RuntimeError(f"this step cannot be captured in a CUDA graph: {why}. Capture forward and backward, and step "
                        "outside of the graph; nothing was changed")


def _check(optimizer: Any, found: list[Place]) -> None:
    """Raise if the optimizer, or one of its parameters at a glance, cannot be driven by a device."""
    if why := optimizer.not_driven():
        raise NotDriven(why)
    if optimizer.defaults.get("differentiable"):
        raise NotDriven("differentiable=True records the step for autograd")
    if optimizer.arriving is not None:
        raise NotDriven("parameters are stepped as their gradients arrive (step_on_arrival)")
    if optimizer._limit is None and optimizer._coefficient != 1.0:
        raise NotDriven("the host scales the gradients")
    standing_in = asked(optimizer) and (optimizer.backend or dispatch.forced()) not in (None, "cpu")
    for where in found:
        p = optimizer._param(where)
        if p.device.type == "cpu" and not standing_in:  # another backend is: for a GPU, in CPU memory
            raise NotDriven(f"{optimizer._name(where)} is on the CPU")
        if p.grad.layout != torch.strided:
            raise NotDriven(f"{optimizer._name(where)} has a sparse gradient")
        if shares(p) and optimizer.param_groups[where[0]].get("clip_each") is not None:
            raise NotDriven(f"{optimizer._name(where)} is cut into shards, whose norms clip_each adds on the host")


# --- The step ---------------------------------------------------------------------------------------------------------

def step(optimizer: Any, found: list[Place], rules: list[Rule], report: StepReport) -> bool:
    """Take a step that devices drive; False if they cannot, after all, and nothing was done.

    Raises:
        RuntimeError, ValueError, TypeError: as `Optimizer.step`; or a step cannot be captured.
    """
    drive = optimizer._drive or Drive()
    remainders, groups = dict(optimizer._remainders), [dict(group) for group in optimizer.param_groups]
    try:
        with undone(optimizer) as examining:
            ready = _ready(optimizer, drive, found, rules, examining, report)
    except BaseException as error:
        optimizer._remainders = remainders
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(before)
        if not isinstance(error, NotDriven):
            raise
        if capturing():
            raise refused(error) from None
        return False
    optimizer._drive = drive
    _launch(optimizer, drive, ready, report)
    return True


def _ready(optimizer: Any, drive: Drive, found: list[Place], rules: list[Rule], examining: Callable[[Tensor], None],
           report: StepReport) -> list[Prepared]:
    """What steps the parameters, with the gradients and the hyperparameters of now."""
    known, same = {}, found == drive.stepped
    steps: dict[int, float] = {}
    fresh: list[tuple[Tensor, Hashable]] = []
    for where in found:
        old = drive.entries.get(where)
        if old is None or not _fits(optimizer, old, rules[where[0]]):
            same = False
            if capturing():
                raise NotDriven(f"no step before was driven by the device in which {optimizer._name(where)} had such a "
                                "gradient, such states and options: take one before the capture, of an optimizer made "
                                "with capturable=True, or let fasttrain.StepGraph do it")
            examining(optimizer._param(where))
            old = _entry(optimizer, drive, where, rules[where[0]], steps, fresh, report)
        known[where] = old
    if same:
        for one in drive.ready:
            one.update()
            if not capturing():
                one.refresh(optimizer)
        return drive.ready
    if capturing():
        raise NotDriven("other parameters have gradients than in the step before: take one step with these first")
    drive.cohorts.add(fresh)
    made = _prepared(optimizer, drive, known, steps)
    drive.entries, drive.ready, drive.stepped = {**drive.entries, **known}, made, found
    return made


def _prepared(optimizer: Any, drive: Drive, known: dict[Place, Entry], steps: dict[int, float]) -> list[Prepared]:
    by_device: dict[torch.device, list[Entry]] = {}
    for one in known.values():
        by_device.setdefault(one.item.tensors[0].device, []).append(one)
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
                    backends[device]) for device, entries in by_device.items()]
    if optimizer.running_of_groups:
        advancing_groups(optimizer, made[0], backends[home])
    return made


def _signature(optimizer: Any, where: Place, rule: Rule) -> tuple[Any, ...]:
    """What an entry was made for, beside its states."""
    group, p = optimizer.param_groups[where[0]], optimizer._param(where)
    own, grad = local(p), local(p.grad)
    return (rule, own.dtype, own.data_ptr(), own.shape, own.stride(), own.device, type(p), type(p.grad), grad.dtype,
            grad.shape, grad.stride(), grad.device, grad.is_neg(), grad.is_conj(), bool(group.get("zero_gradients")),
            group.get("ema_decay") is None, group.get("clip_each") is None, is_plain(group))


def _fits(optimizer: Any, old: Entry, rule: Rule) -> bool:
    """Whether nothing but the values changed since an entry was made."""
    p, state = optimizer._param(old.where), optimizer.state.get(old.p, ())
    if p is not old.p or any(local(state.get(key)) is not tensor if state else True for key, tensor in old.kept):
        return False
    return (not old.watched or optimizer._versions.get(id(p)) == version(p)) and \
        _signature(optimizer, old.where, rule) == old.signature


def _entry(optimizer: Any, drive: Drive, where: Place, rule: Rule, steps: dict[int, float],
           fresh: list[tuple[Tensor, Hashable]], report: StepReport) -> Entry:
    """Examine a parameter, and put its counts where the device has them."""
    p, name = optimizer._param(where), optimizer._name(where)
    one: Examined = examine(optimizer, where, rule, report, drive.steps_of)
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
    keys = [key for key in state if isinstance(state[key], Tensor)]
    watched = one.kept is not None and one.kept.extras[0] is not None
    return entry(where, p, _signature(optimizer, where, rule), tuple((key, local(state[key])) for key in keys), item,
                 name, watched)


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
    if capturing():
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
        for item in one.items:
            report.count(item)
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
    names = sorted({name for group, rule in zip(optimizer.param_groups, map(optimizer.rule_of, optimizer.param_groups),
                                                strict=True)
                    for name, value in optimizer._hyperparameters(rule, group).items() if isinstance(value, float)})
    if names and not drive.replayed and not drive.captured:
        warnings.warn(f"{', '.join(names)} of {type(optimizer).__name__} are Python numbers, and a CUDA graph is being "
                      "captured: its replays go on with the values of now until optimizer.refresh() is called. Use "
                      "fasttrain.StepGraph, which calls it, or give tensors on the device", UserWarning, stacklevel=6)


def refresh(optimizer: Any) -> None:
    """Send the hyperparameters to every step that is ready or captured."""
    drive = optimizer._drive
    if drive is None:
        return
    if capturing():
        raise RuntimeError("refresh() while a CUDA graph is captured: call it before each replay")
    if drive.outdated:
        raise RuntimeError("the optimizer's states were replaced (load_state_dict, or a step on the host) since a step "
                           "was captured in a CUDA graph, which goes on with the old ones: capture it again")
    now = rules(optimizer)
    for one in drive.captured:
        for spec in one.specs:
            if now[spec.group] is not spec.rule:
                raise RuntimeError(f"the options of group {spec.group} select rule {now[spec.group].name}, and rule "
                                   f"{spec.rule.name} was captured in a CUDA graph: capture the step again")
    for one in (*drive.captured, *drive.ready):
        one.refresh(optimizer)


def rules(optimizer: Any) -> list[Rule]:
    """The rule of each group; where a number that selects it is on the device, the one that takes any value of it."""
    return [optimizer.rule_of({key: ANY if far(value) else value for key, value in group.items() if key != "params"})
            for group in optimizer.param_groups]


def unstepped(optimizer: Any) -> list[Tensor]:
    """Parameters whose every step was skipped by the device, where only their states would tell; waits for it."""
    once = {} if optimizer._drive is None else optimizer._drive.once
    made = [p for group in optimizer.param_groups for p in group["params"] if id(p) in once]
    by_device: dict[torch.device, list[Tensor]] = {}
    for p in made:
        by_device.setdefault(once[id(p)].device, []).append(p)
    return [p for own in by_device.values()
            for p, count in zip(own, torch.stack([once[id(p)] for p in own]).tolist(), strict=True) if count == 0]


def leave(optimizer: Any) -> None:
    """Give the steps back to the host: those that were never made shall be first ones."""
    states = {name for rule in rules(optimizer) for name in rule.state}
    for p in unstepped(optimizer):
        for key in [key for key in optimizer.state[p] if key.removesuffix("_scale") in states]:
            del optimizer.state[p][key]
    optimizer._drive = after(optimizer._drive)


def after(drive: Drive | None) -> Drive | None:
    """What follows when states were replaced. CUDA graphs may still write the old ones, which are kept for them."""
    if drive is None or not (drive.captured or drive.outdated):
        return None
    new = Drive()
    new.outdated = [*drive.outdated, *drive.captured]
    return new
