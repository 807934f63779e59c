"""The first two phases of a step: which parameters the plan does not know, and what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttrain.kernels import dispatch, native
from fasttrain.kernels.item import Item
from fasttrain.optim import kept
from fasttrain.optim.checks import check_counter, check_gradient, check_running, plain, reals
from fasttrain.optim.groups import Groups, lists_of
from fasttrain.optim.local import (
    as_whole,
    check_placed,
    dtensor_type,
    local,
    settle,
    shares,
    version,
)
from fasttrain.optim.page import Group
from fasttrain.optim.placing import place
from fasttrain.optim.report import StepReport
from fasttrain.precision.storage import is_plain
from fasttrain.rule import Rule


class Examined(NamedTuple):
    """A parameter that was looked at in Python: how it is stepped, and what the plan must know of it."""

    where: tuple[int, int]  # group, and index in it
    group: Group            # with the running numbers of this parameter
    item: Item
    step: float             # the count of the step to come
    fresh: bool             # a state was made
    kept: kept.Layout | None


def scan(optimizer: Groups, rules: list[Rule]) -> list[int]:
    """Indices of the parameters that have a gradient and are neither, or no longer, in the plan nor known afar."""
    lists = lists_of(optimizer)
    wanted = optimizer.backend or dispatch.forced()
    kinds = [kind_of(group, rule) for group, rule in zip(optimizer.param_groups, rules, strict=True)]
    made_for = (rules, wanted, kinds)
    if optimizer._planned_for == made_for:
        vouched, known = optimizer._vouched, optimizer._afar
        if vouched is not None and optimizer._plan is None and known is not None and known.is_vouched(vouched, lists):
            return []
        found = [one.scan(optimizer.state, lists) for one in (optimizer._plan, optimizer._afar) if one is not None]
        if found and all(one is not None for one in found):
            return found[0] if len(found) == 1 else sorted(set(found[0]).intersection(found[1]))
    optimizer._planned_for = made_for
    optimizer._places = [(g, i) for g, params in enumerate(lists) for i in range(len(params))]
    optimizer._afar, optimizer._plan = None, None
    near = any(p.device.type == "cpu" for params in lists for p in params)
    if optimizer.defaults.get("differentiable") or wanted not in (None, "cpu") or native.load()[0] is None or not near:
        return [index for index, where in enumerate(optimizer._places) if optimizer._param(where).grad is not None]
    optimizer._plan = native.module().Plan(native.reader(dtensor_type()), lists)
    return optimizer._plan.scan(optimizer.state, lists)


def kind_of(group: Group, rule: Rule) -> tuple[Any, ...]:
    """What of a group its parameters are examined for, beside themselves."""
    return (rule, bool(group.get("zero_gradients")), group.get("ema_decay") is None, group.get("clip_each") is None,
            is_plain(group))


def examine(optimizer: Groups, where: tuple[int, int], rule: Rule, report: StepReport,
            steps_of: Callable[[Tensor, StepReport], float] | None = None) -> Examined:
    """Check one parameter and make its states. `steps_of` reads a step count, if not `counted`."""
    group, whole, name = optimizer.param_groups[where[0]], optimizer._param(where), optimizer._name(where)
    check_placed(name, whole)
    settle(whole)
    p, grad = local(whole), local(whole.grad)
    check_gradient(name, p, grad)
    known = len(optimizer.state.get(whole, ()))
    fresh = optimizer.init_state(whole, group, rule)
    kept_apart = rule.state or optimizer.counts_steps or optimizer.running or not is_plain(group)
    state = {key: local(value) for key, value in optimizer.state[whole].items()} if kept_apart else {}
    counter = None
    if optimizer.counts_steps:
        check_counter(name, state.get("step"))
        counter = plain(state["step"])
    step = (steps_of or counted)(counter, report) + 1 if counter is not None else 1 if fresh else 2
    if is_plain(group):
        item = Item(name, rule, reals(name, p, grad, rule.state, state), (), counter)
        report.allocations += len(state) - known
        return Examined(where, group, item, step, fresh, None)
    layout = optimizer._layout(name, whole, grad.dtype, group, rule)
    if (digits := optimizer._remainders.pop(id(whole), None)) is not None and layout.extras[0] is not None:
        state[layout.extras[0]] = digits
        optimizer.state[whole][layout.extras[0]] = as_whole(digits, whole)
    made = kept.complete(p, state, layout, fresh or step == 1)  # torch makes Adagrad's with the optimizer
    optimizer.state[whole].update((key, as_whole(state[key], whole)) for key in made)
    report.allocations += len(optimizer.state[whole]) - known
    if layout.stochastic:
        group.setdefault("draws", 0)
    if written_outside(optimizer, where, whole):
        kept.follow(p, state, layout)
    mains, extras = kept.operands(name, p, grad, state, layout, group)
    item = Item(name, rule, mains, (), counter, layout.codecs, extras, bool(group.get("zero_gradients")),
                place=place(name, whole) if layout.stochastic else (0, 0, 0))
    return Examined(where, group, item, step, fresh, layout)


def counted(counter: Tensor, report: StepReport) -> float:
    """A step count as a number; where a device has it, the host waits for that."""
    report.host_syncs += counter.device.type != "cpu"
    return counter.item()


def written_outside(optimizer: Groups, where: tuple[int, int], p: Tensor) -> bool:
    """Whether the parameter was written since our last step, where that is known."""
    known = optimizer._versions.pop(id(p), -1)
    for one in (optimizer._plan, optimizer._afar):
        if known < 0 and one is not None:
            known = one.version(optimizer._places.index(where))
    return known >= 0 and known != version(p)


def describe(optimizer: Groups, index: int, one: Examined) -> bool:
    """Give a parameter to the plan, if it can take it."""
    rule, p = one.item.rule, optimizer._param(optimizer._places[index])
    if optimizer._plan is None or p.is_complex() or p.device.type != "cpu":
        return False
    if shares(p) and one.group.get("clip_each") is not None:  # the plan knows the norm of the local part
        return False
    if native.number_of(rule) is None:
        return False
    counted = ("step",) if optimizer.counts_steps else ()
    wide = one.item.dtype == torch.float64
    if one.kept is None:
        keys = (*rule.state, *counted)
        state = optimizer.state[p] if keys or optimizer.running else {}
        return optimizer._plan.set(index, native.number_of(rule), wide, state, keys, optimizer.counts_steps, one.fresh,
                                   None, optimizer.running)
    told = (one.kept.codecs, one.kept.extras, one.kept.averaged, one.item.zero, optimizer._identity(one.where),
            one.item.place, one.kept.extras[0] is not None)
    return optimizer._plan.set(index, native.number_of(rule), wide, optimizer.state[p],
                               (*one.kept.keys[2:], *counted), optimizer.counts_steps, one.fresh, told,
                               optimizer.running)


def advance(optimizer: Groups, one: Examined) -> tuple[Examined, list[tuple[Tensor, Tensor]]]:
    """The hyperparameters with the running numbers of one parameter, and what replaces these when all is done."""
    group, before, after = advanced(optimizer, one.where, one.step)
    return one._replace(group=group), list(zip(before, after, strict=True))


def advanced(optimizer: Groups, where: tuple[int, int], step: float) -> tuple[Group, list[Tensor], list[Tensor]]:
    """The hyperparameters with the running numbers of a step; those before it, those after it, of equal types."""
    group = optimizer.param_groups[where[0]]
    if not optimizer.running:
        return group, [], []
    state = optimizer.state[optimizer._param(where)]
    for key in optimizer.running:
        check_running(optimizer._name(where), key, state)
    before = {key: state[key] for key in optimizer.running}
    now, later = optimizer.advance(before, group, step)
    after = {**before, **{key: torch.as_tensor(value).to(before[key]).reshape(before[key].shape)
                          for key, value in later.items()}}
    return {**group, **now}, list(before.values()), list(after.values())


@contextmanager
def undone(optimizer: Groups) -> Iterator[Callable[[Tensor], None]]:
    """Gives a function to be told of every parameter that is examined; if the block raises, their states are undone."""
    before: list[tuple[Tensor, dict[str, Any]]] = []

    def examining(p: Tensor) -> None:
        before.append((p, dict(optimizer.state.get(p, ()))))

    try:
        yield examining
    except BaseException:
        for p, state in before:
            if state:
                optimizer.state[p].clear()
                optimizer.state[p].update(state)
            else:
                optimizer.state.pop(p, None)
        raise
