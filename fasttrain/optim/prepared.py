"""The parameters of one device, ready to be stepped by it: their entries, the rows that they read, and the launch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasttrain.kernels import driven, norm
from fasttrain.kernels.item import Item, apart, flat
from fasttrain.kernels.moved import Gradients
from fasttrain.kernels.prologue import Row
from fasttrain.optim.checks import plain
from fasttrain.optim.cohorts import Cohorts
from fasttrain.optim.equation import reads_step
from fasttrain.optim.kept import Layout, follow
from fasttrain.optim.local import is_dtensor, local, version
from fasttrain.optim.report import StepReport
from fasttrain.optim.roster import versions
from fasttrain.optim.running import Line, Running
from fasttrain.precision.storage import is_plain
from fasttrain.rule import Rule

TOLD = ("found", "grad_scale", "norm", "max_norm")  # numbers of a step that are no hyperparameters, and what they are
UNTOLD = (0.0, 1.0, 0.0, math.inf)                  # where nobody told them


class NotDriven(Exception):
    """Why a device cannot drive a step."""


class Entry(NamedTuple):
    """A parameter as it was examined: it is not looked at again where nothing of this has changed."""

    where: tuple[int, int]
    p: Tensor
    kind: tuple[Any, ...]  # what of its group's options it was made for
    item: Item             # without the gradient, in whose place is one that has no memory
    staged: Tensor | None  # takes the gradient in the order of the parameter
    layout: Layout | None

    @property
    def watched(self) -> bool:
        """Whether a second array must follow what is written to the parameter."""
        return self.layout is not None and self.layout.extras[0] is not None

    def gradient(self) -> Tensor:
        """The gradient that the parameter has now."""
        grad = local(self.p.grad)
        return plain(torch.view_as_real(grad) if grad.is_complex() else grad)

    def now(self) -> Tensor:
        """The gradient that the step reads."""
        return self.gradient() if self.staged is None else self.staged


def entry(where: tuple[int, int], p: Tensor, kind: tuple[Any, ...], item: Item, name: str,
          layout: Layout | None) -> Entry:
    """An entry; a gradient whose elements lie in another order than the parameter's gets memory that follows it.

    Raises:
        NotDriven: the parameter or a state is not one stretch of memory.
    """
    staged = None
    if not flat(item):
        own, grad, *states = item.tensors
        staged = torch.empty_like(own, dtype=grad.dtype)
        item = replace(item, tensors=(own, staged, *states))
        if not flat(item):
            raise NotDriven(f"{name}: the parameter and its states do not lie in memory in one order without gaps")
    return Entry(where, p, kind, with_gradient(item, without_memory(item.tensors[1])), staged, layout)


def with_gradient(item: Item, grad: Tensor) -> Item:
    return replace(item, tensors=(item.tensors[0], grad, *item.tensors[2:]))


def without_memory(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


class Spec(NamedTuple):
    """Where the numbers of a row come from."""

    group: int
    rule: Rule
    counter: Tensor | None
    step: float
    square: Tensor | None
    draws: Tensor | None
    running: Mapping[str, Tensor]


def on(value: Any, device: torch.device, name: str) -> Any:
    """A hyperparameter for a row: tensors on the device stay, others become numbers.

    Raises:
        NotDriven: it lies on another device.
    """
    if isinstance(value, (tuple, list)):
        return tuple(on(part, device, name) for part in value)
    if not isinstance(value, (Tensor, np.generic)) or (isinstance(value, Tensor) and value.device == device):
        return value
    if isinstance(value, Tensor) and value.device.type != "cpu":
        raise NotDriven(f"{name} is on {value.device}, and parameters are on {device}")
    return value.item()


@dataclass
class Prepared:
    """What steps the parameters of one device. In a capture it takes their gradients' addresses, and is kept from then
    on as it is. It keeps no gradient alive.
    """

    device: torch.device
    entries: list[Entry]
    specs: list[Spec]
    step: driven.Driven
    told: Tensor    # float64: `TOLD`
    squares: Tensor  # float64: of the gradients that are clipped each
    each: list[Entry]
    once: list[Tensor]  # counts of what is told the first step from later ones only
    running: Running | None = None
    said: list[float | None] = field(default_factory=lambda: list(UNTOLD))  # None: a tensor
    traffic: tuple[int, int] = (0, 0)  # bytes read and written
    at: np.ndarray | None = None  # which of the parameters of all devices these are; None: all
    addresses: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # of the gradients

    def __post_init__(self) -> None:
        self.staged = [one for one in self.entries if one.staged is not None]
        self.zeroed = [one for one in self.entries if one.item.zero]
        self.watched = [one for one in self.entries if one.watched]
        self.ids = [id(one.p) for one in self.watched]
        self.wholes = [one.p for one in self.entries if is_dtensor(one.p)]
        self.others = [one.staged for one in self.entries] if self.staged else []

    def rows(self, optimizer: Any) -> list[Row]:
        """The rows, of the hyperparameters as they are now."""
        return [row(optimizer, spec, self.device, self.told) for spec in self.specs]

    def refresh(self, optimizer: Any) -> None:
        """Send the hyperparameters of now, where they differ."""
        self.step.refresh(self.rows(optimizer))
        if self.running is not None:
            self.running.refresh(optimizer)

    def tell(self, *values: Any) -> None:
        """Write the numbers `TOLD` of the step to come; what is None is as if nobody told it."""
        for place, (value, usual) in enumerate(zip(values, UNTOLD, strict=True)):
            value = usual if value is None else value
            if isinstance(value, Tensor) and (value.device.type != "cpu" or self.device.type == "cpu"):
                self.told[place : place + 1].copy_(value.detach().reshape(1))
                self.said[place] = None
            elif (number := float(value)) != self.said[place]:
                self.told[place : place + 1].fill_(number)
                self.said[place] = number

    def update(self, addresses: np.ndarray) -> None:
        """Take the gradients of now, which lie at these addresses, of the parameters of all devices."""
        own = addresses if self.at is None else addresses[self.at]
        grads = Gradients(own, lambda: [one.now() for one in self.entries])
        if self.staged:
            grads = grads.but(self.others)
        if not np.array_equal(grads.addresses, self.addresses):
            self.step.move(grads)
            self.addresses = grads.addresses

    def launch(self) -> None:
        """Queue the step, and tell autograd of what it writes what the kernels do not know."""
        self.queue()
        if written := [*self.wholes, *(one.gradient() for one in self.zeroed)]:
            torch.autograd.graph.increment_version(written)

    def queue(self) -> None:
        """Queue the step, and whatever on the device goes with it."""
        for one in self.staged:
            assert one.staged is not None
            one.staged.copy_(one.gradient())
        if self.each:
            self.squares.copy_(norm.squares([one.gradient() for one in self.each])[0])
        if self.running is not None:
            self.running.before_step()
        self.step.launch()
        if self.running is not None:
            self.running.after_step()
        if self.once:
            torch._foreach_clamp_max_(self.once, 1.0)
        for one in self.zeroed:
            if one.staged is not None:
                one.gradient().copy_(one.staged)

    def follow(self, optimizer: Any) -> None:
        """Bring second arrays up to date with parameters that were written since the last step that the host saw."""
        for one in self.watched:
            if optimizer._versions.get(id(one.p)) != version(one.p):
                assert one.layout is not None
                state = {key: local(value) for key, value in optimizer.state[one.p].items()}
                follow(local(one.p), state, one.layout)
        self.remember(optimizer)

    def remember(self, optimizer: Any) -> None:
        optimizer._versions.update(zip(self.ids, versions([one.p for one in self.watched]), strict=True))


def row(optimizer: Any, spec: Spec, device: torch.device, told: Tensor) -> Row:
    """A row of the hyperparameters as they are now."""
    group = {**optimizer.param_groups[spec.group], **spec.running}
    numbers = {name: on(value, device, name) for name, value in optimizer._hyperparameters(spec.rule, group).items()}
    found, grad_scale, norm, max_norm = told
    made = Row(numbers, spec.counter, spec.step, -1.0 if group.get("maximize") else 1.0, grad_scale, found, norm,
               max_norm, seed=group.get("seed", 0), draws=spec.draws)
    if spec.square is not None:
        made = replace(made, square=spec.square, max_each=on(group["clip_each"], device, "clip_each"))
    if is_plain(group):
        return made
    return replace(made, **{name: on(group.get(name), device, name) for name in ("clip_value", "ema_decay")})


def prepare(optimizer: Any, entries: Sequence[Entry], steps: Mapping[int, float], once: Mapping[int, Tensor],
            cohorts: Cohorts, draws: Mapping[int, Tensor], backend: str, at: np.ndarray | None) -> Prepared:
    """Make what steps some parameters, all on one device.

    Arguments:
        steps: of parameters without a step count, by id: the step to come.
        once: of those that are at their first step, by id: a count that is 1 ever after.
        draws: counts of draws, by group.
        at: which of the parameters of all devices these are; None: all.

    Raises:
        NotDriven: it cannot be made.
    """
    device = entries[0].item.tensors[0].device
    told = torch.empty(len(TOLD), dtype=torch.float64, device=device)
    for place, value in enumerate(UNTOLD):
        told[place].fill_(value)
    each = [one for one in entries if optimizer.param_groups[one.where[0]].get("clip_each") is not None]
    squares = torch.zeros(len(each), dtype=torch.float64, device=device)
    square_of = {id(one.p): square for one, square in zip(each, squares, strict=True)}
    known: dict[tuple[Any, ...], int] = {}
    specs: list[Spec] = []
    row_of, items = [], []
    for one in entries:
        group = optimizer.param_groups[one.where[0]]
        item = replace(with_gradient(one.item, one.now()), key=optimizer._identity(one.where),
                       counter=once.get(id(one.p), one.item.counter))
        square = square_of.get(id(one.p))
        step = steps.get(id(one.p), 1.0)
        key = (one.where[0], item.rule, None if item.counter is None else cohorts.of(item.counter), step, id(square))
        if key not in known:
            known[key] = len(specs)
            numbers = {name: local(optimizer.state[one.p][name]) for name in optimizer.running}
            specs.append(Spec(one.where[0], item.rule, item.counter, step, square,
                              draws.get(one.where[0]) if "draws" in group else None, numbers))
        row_of.append(known[key])
        items.append(item)
    if not apart(items):
        raise NotDriven("some parameters or states share memory")
    rows = [row(optimizer, spec, device, told) for spec in specs]
    if reason := driven.why_not(items, rows, row_of, backend):
        raise NotDriven(reason)
    running = None
    if optimizer.running:
        lines = [Line(partial(_advancing, spec.group, spec.counter, device), {
            name: [local(optimizer.state[one.p][name]) for one, row in zip(entries, row_of, strict=True)
                   if row == number] for name in optimizer.running}) for number, spec in enumerate(specs)]
        running = Running(optimizer, lines, told[0], backend)
    counts = [count for one in entries if (count := once.get(id(one.p))) is not None]
    counted = StepReport()
    for item in items:
        counted.count(item)
    step = optimizer._driven(items, [one.where for one in entries], rows, row_of, backend)
    return Prepared(device, list(entries), specs, step, told, squares, each, counts, running,
                    traffic=(counted.bytes_read, counted.bytes_written),
                    at=at, addresses=np.array([item.tensors[1].data_ptr() for item in items], np.int64))


def advancing_groups(optimizer: Any, made: Prepared, backend: str) -> None:
    """Have the numbers of every group advanced with the step."""
    lines = [Line(partial(_advancing, index, None, made.device),
                  {name: [group[name]] for name in optimizer.running_of_groups})
             for index, group in enumerate(optimizer.param_groups)]
    made.running = Running(optimizer, lines, made.told[0], backend)


def _advancing(index: int, counter: Tensor | None, device: torch.device, optimizer: Any) -> Row:
    values = optimizer._hyperparameters(optimizer.advancing, optimizer.param_groups[index])
    return Row({name: on(value, device, name) for name, value in values.items()}, counter)


def first_step_only(rule: Rule, counted: bool) -> bool:
    """Whether the parameters of a rule are told their first step from the later ones, and have no step count."""
    return not counted and reads_step(rule)
