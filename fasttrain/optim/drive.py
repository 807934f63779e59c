"""Steps that devices drive: what an optimizer keeps for them, and when it takes them.

A step on a GPU is driven by it where the host cannot know a number without waiting: the loss scale, what was found in
the gradients, the norm that they are clipped to, or a hyperparameter lies on the device; where ``capturable=True`` asks
for it; and while a CUDA graph is captured. Once driven, an optimizer stays so. Step counts are then on the device, as
torch's capturable optimizers have them, and so are the counts of random draws in the groups.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttrain.kernels import dispatch
from fasttrain.optim.cohorts import Cohorts
from fasttrain.optim.examine import counted
from fasttrain.optim.groups import lists_of
from fasttrain.optim.local import is_dtensor, settle, shares
from fasttrain.optim.prepared import (
    Entry,
    NotDriven,
    Prepared,
)
from fasttrain.optim.report import StepReport
from fasttrain.optim.roster import roster
from fasttrain.rule import Rule

Place = tuple[int, int]  # group, and index in it
ANY = 0.5  # a number that is no special case of any equation


class Found(NamedTuple):
    """The parameters that have a gradient.

    Attributes:
        indices: among all parameters, in their order.
        places: of the same.
        others: indices of those that are not as they were when they were last examined.
    """

    indices: list[int]
    places: list[Place]
    others: list[int]


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
        self.kinds: list[Any] = []  # of groups: what entries were made for
        self.roster: Any = None
        self.found = Found([], [], [])
        self.active = b""  # what was active when it was found
        self.vouched: Any = None  # of the last step, where no master follows what others write
        self.checked: Any = None  # for which options every known parameter was checked
        self.numbers: list[Any] = []  # of groups, which `ready` counts
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


def places(optimizer: Any) -> Found | None:
    """The parameters that have a gradient, if devices can drive all of them and should; else None.

    Raises:
        RuntimeError: a CUDA graph is being captured, and something in the step cannot be.
    """
    captured = capturing()
    if not captured and not reason(optimizer):
        return None
    drive = optimizer._drive
    try:
        found = find(optimizer, drive, captured)
        _check(optimizer, drive, found)
    except NotDriven as why:
        if drive is not None and drive.roster is not None:
            drive.roster.release()
        if captured:
            raise refused(why) from None
        return None
    if captured and not found.places:
        raise refused(NotDriven("no parameter has a gradient"))
    return found


def find(optimizer: Any, drive: Drive | None, captured: bool) -> Found:
    """What has a gradient, compared with what is known."""
    lists = lists_of(optimizer)
    if drive is None or drive.roster is None:
        has = bytearray(p.grad is not None for params in lists for p in params)
        return _found(lists, has, [index for index, one in enumerate(has) if one])
    if optimizer._vouched is not None and not captured and optimizer._vouched == drive.vouched and \
            drive.active.count(1) == sum(map(len, lists)):
        return drive.found
    others = drive.roster.scan(optimizer.state, lists)
    if others is None:
        drive.roster = roster(lists)
        others = drive.roster.scan(optimizer.state, lists)
    if others and not captured:
        others = [index for index in others if not _again(drive, optimizer, index, lists)]
    active = drive.roster.active()
    if others or active != drive.active:
        has = bytearray(active)
        for index in others:
            has[index] = 1
        drive.found, drive.active = _found(lists, has, others), b"" if others else active
    return drive.found


def _found(lists: list[list[Tensor]], has: bytes | bytearray, others: list[int]) -> Found:
    all_places = [(g, i) for g, params in enumerate(lists) for i in range(len(params))]
    indices = [index for index, one in enumerate(has) if one]
    return Found(indices, [all_places[index] for index in indices], others)


def _again(drive: Drive, optimizer: Any, index: int, lists: list[list[Tensor]]) -> bool:
    """Whether a gradient is as it was, once it is placed as its parameter is."""
    p = next(itertools.islice(itertools.chain.from_iterable(lists), index, None))
    if not is_dtensor(p) or not is_dtensor(p.grad):
        return False
    before = p.grad
    settle(p)
    return p.grad is not before and bool(drive.roster.again(index, optimizer.state))


def refused(why: NotDriven) -> RuntimeError:
    return RuntimeError(f"this step cannot be captured in a CUDA graph: {why}. Capture forward and backward, and step "
                        "outside of the graph; nothing was changed")


def _check(optimizer: Any, drive: Drive | None, found: Found) -> None:
    """Raise if the optimizer, or one of its parameters at a glance, cannot be driven by a device."""
    if why := optimizer.not_driven():
        raise NotDriven(why)
    if optimizer.defaults.get("differentiable"):
        raise NotDriven("differentiable=True records the step for autograd")
    if optimizer.offload:
        raise NotDriven("offload=True keeps states on the host, which steps them")
    if optimizer.arriving is not None:
        raise NotDriven("parameters are stepped as their gradients arrive (step_on_arrival)")
    if optimizer._limit is None and optimizer._coefficient != 1.0:
        raise NotDriven("the host scales the gradients")
    for where in found.places[:1] if optimizer.running or optimizer.running_of_groups else ():
        if why := dispatch.load("triton").why_not(optimizer._param(where).device):
            raise NotDriven(f"Triton advances the running numbers of {type(optimizer).__name__}, and cannot: {why}")
    standing_in = asked(optimizer) and (optimizer.backend or dispatch.forced()) not in (None, "cpu")
    options = standing_in, [group.get("clip_each") is None for group in optimizer.param_groups]
    known = drive is not None and drive.checked == options
    others = set(found.others)
    for index, where in zip(found.indices, found.places, strict=True) if others or not known else ():
        if known and index not in others:
            continue
        p = optimizer._param(where)
        if p.device.type == "cpu" and not standing_in:  # another backend is: for a GPU, in CPU memory
            raise NotDriven(f"{optimizer._name(where)} is on the CPU")
        if p.grad.layout != torch.strided:
            raise NotDriven(f"{optimizer._name(where)} has a sparse gradient")
        if shares(p) and optimizer.param_groups[where[0]].get("clip_each") is not None:
            raise NotDriven(f"{optimizer._name(where)} is cut into shards, whose norms clip_each adds on the host")
    if drive is not None:
        drive.checked = options


# --- Between steps ----------------------------------------------------------------------------------------------------

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
    now = rules_of(optimizer)
    for one in drive.captured:
        for spec in one.specs:
            if now[spec.group] is not spec.rule:
                raise RuntimeError(f"the options of group {spec.group} select rule {now[spec.group].name}, and rule "
                                   f"{spec.rule.name} was captured in a CUDA graph: capture the step again")
    for one in (*drive.captured, *drive.ready):
        one.refresh(optimizer)
        one.follow(optimizer)


def rules_of(optimizer: Any) -> list[Rule]:
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
    states = {name for rule in rules_of(optimizer) for name in rule.state}
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
