"""Parameters on other devices than the CPU that the host steps: known from step to step, as the plan knows those here.

At every step they are compared with what they were, in one call (`fasttrain.optim.roster`); of what is as it was, only
rows of coefficients are computed and addresses of gradients sent (`fasttrain.kernels.standing`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrain.kernels import dispatch
from fasttrain.kernels.item import Item, apart, flat
from fasttrain.kernels.standing import Standing
from fasttrain.optim.examine import Examined
from fasttrain.optim.groups import Groups, lists_of
from fasttrain.optim.local import is_dtensor, settle
from fasttrain.optim.prepared import with_gradient, without_memory
from fasttrain.optim.report import StepReport
from fasttrain.optim.roster import compiled
from fasttrain.optim.runs import key_of
from fasttrain.precision import draws
from fasttrain.rule import Rule

BACKENDS = ("cuda", "triton")
MOST = 16  # sets of parameters whose tables are kept: of experts, say, that are not all used in every step


@dataclass
class Stood:
    """What steps some of the parameters.

    Attributes:
        parts: for each device and backend, which of the parameters, and their launches.
        zeroed: which of the parameters' gradients are zeroed, and their bytes.
        counts: of one step.
        shared: some of them share memory, the gradients aside.
    """

    active: bytes
    row_of: np.ndarray
    shared: bool
    parts: list[tuple[np.ndarray, Standing]]
    zeroed: tuple[np.ndarray, np.ndarray]
    counts: StepReport


class Afar:
    """What an optimizer keeps for them.

    Attributes:
        items: by index among all parameters, without gradients.
        shared: some share memory, so that they are stepped one by one.
    """

    def __init__(self, lists: Sequence[Sequence[Tensor]], places: Sequence[tuple[int, int]]) -> None:
        self.roster, self.places = compiled(lists), places
        self.items: dict[int, Item] = {}
        self.backends: dict[int, str] = {}
        self.identities: dict[int, int] = {}
        self.stood: OrderedDict[tuple[bytes, bytes], Stood] = OrderedDict()
        self.last: Stood | None = None
        self.shared = self.watches = False
        self.vouched: Any = None  # of the last step

    def scan(self, state: Any, lists: Sequence[Sequence[Tensor]]) -> list[int] | None:
        """Indices of the parameters that have a gradient and are not, or no longer, known."""
        found: list[int] | None = self.roster.scan(state, lists)
        return found and [index for index in found if not self._again(index, state, lists)]

    def _again(self, index: int, state: Any, lists: Sequence[Sequence[Tensor]]) -> bool:
        """Whether a gradient is as it was, once it is placed as its parameter is."""
        p = lists[self.places[index][0]][self.places[index][1]]
        if index not in self.items or not is_dtensor(p) or not is_dtensor(before := p.grad):
            return False
        settle(p)
        return p.grad is not before and bool(self.roster.again(index, state))

    def is_vouched(self, now: Any, lists: Sequence[Sequence[Tensor]]) -> bool:
        """Whether somebody says that all is as at the last step (`fasttrain.parallel.Reducer.vouch`)."""
        return bool(now == self.vouched) and len(self.places) == sum(map(len, lists))

    def version(self, index: int) -> int:
        return int(self.roster.version(index))

    def release(self) -> None:
        self.roster.release()

    def leave(self) -> list[tuple[int, int]]:
        """Give up, for parameters that share memory: the places of those that would be stepped now."""
        left = [self.places[index] for index, one in enumerate(self.roster.active()) if one]
        self.shared = True
        self.items.clear()
        self.roster = Nobody()
        return left

    def stand(self, active: bytes, row_of: np.ndarray) -> Stood:
        """What steps the active parameters."""
        if self.last is not None and self.last.active == active and np.array_equal(self.last.row_of, row_of):
            return self.last
        key = active, row_of.tobytes()
        if (known := self.stood.get(key)) is None:
            known = self.stood[key] = self._made(active, row_of)
            while len(self.stood) > MOST:
                self.stood.popitem(last=False)
        self.stood.move_to_end(key)
        self.last = known
        return known

    def _made(self, active: bytes, row_of: np.ndarray) -> Stood:
        indices = np.flatnonzero(np.frombuffer(active, np.uint8)).tolist()
        items = [self.items[index] for index in indices]
        parts: dict[tuple[torch.device, str], list[int]] = {}
        counts = StepReport()
        for place, (index, item) in enumerate(zip(indices, items, strict=True)):
            parts.setdefault((item.tensors[0].device, self.backends[index]), []).append(place)
            counts.count(item)
        stood = [(np.array(places), Standing(dispatch.load(backend).Standing(device), [items[i] for i in places],
                                             row_of[places])) for (device, backend), places in parts.items()]
        counts.launches = sum(standing.launches for _, standing in stood)
        zeroed = [place for place, item in enumerate(items) if item.zero]
        shared = not apart([without_zero(item) for item in items])
        return Stood(active, row_of, shared, stood, (np.array(zeroed, np.int64), np.array(
            [items[place].tensors[1].nbytes for place in zeroed], np.int64)), counts)


class Nobody:
    """A roster that knows nobody, where parameters share memory."""

    def scan(self, state: Any, lists: Sequence[Sequence[Tensor]]) -> list[int]:
        return [index for index, p in enumerate(p for params in lists for p in params) if p.grad is not None]

    def active(self) -> bytes:
        return b""

    def version(self, index: int) -> int:
        return -1

    def release(self) -> None:
        """It holds nothing."""


def take(optimizer: Groups, index: int, one: Examined) -> bool:
    """Know a parameter from now on, if that can be."""
    item, group = one.item, one.group
    if optimizer.defaults.get("differentiable") or optimizer.running or group.get("clip_each") is not None:
        return False
    backend = dispatch.choose(item.tensors[0].device, optimizer.backend)
    if backend not in BACKENDS or not flat(item) or not dispatch.load(backend).Standing.takes(item):
        return False
    if optimizer._afar is None:
        optimizer._afar = Afar(lists_of(optimizer), optimizer._places)
    known: Afar = optimizer._afar
    if known.shared:
        return False
    own = item.rule.state if one.kept is None else (*one.kept.keys[2:], *(key for key in one.kept.extras if key))
    keys = (*own, *(("step",) if item.counter is not None else ()))
    state = optimizer.state[optimizer._param(one.where)] if keys else {}
    watched = one.kept is not None and one.kept.extras[0] is not None
    known.last = None
    known.stood.clear()
    if not known.roster.set(index, state, keys, item.counter is not None, one.fresh, item.zero, watched):
        return False
    known.watches |= watched  # a master follows what others write, so that everything is looked at
    known.items[index] = with_gradient(item, without_memory(item.tensors[1]))
    known.backends[index] = backend
    known.identities[index] = optimizer._identity(one.where)
    return True


def walk(optimizer: Groups, rules: list[Rule], scale: float) -> Callable[[StepReport], None] | None:
    """What steps the known parameters that have a gradient, ready to be started; None if some share memory.

    Raises:
        torch.OutOfMemoryError: there is no memory for the tables; nothing was started.
    """
    known: Afar | None = optimizer._afar
    if known is None or not any(active := known.roster.active()):
        return lambda report: None
    at, row_of = known.roster.rows()
    addresses = known.roster.addresses()
    stood = known.stand(active, row_of)
    if stood.shared or overlapping(addresses, *stood.zeroed):
        return None
    rows = [optimizer._row(rules[group], optimizer.param_groups[group], step, scale) for group, step in at]
    keys = _keys(optimizer, known, at, stood)
    starts = [standing.ready(rows, keys[places] if len(keys) else keys, addresses[places])
              for places, standing in stood.parts]

    def start(report: StepReport) -> None:
        for one in starts:
            one()
        known.roster.stepped(torch.autograd.graph.increment_version)
        known.roster.remember()
        known.vouched = None if known.watches or len(known.items) != len(known.places) else optimizer._vouched
        report.launches += stood.counts.launches
        report.parameters += stood.counts.parameters
        report.bytes_read += stood.counts.bytes_read
        report.bytes_written += stood.counts.bytes_written
    return start


def _keys(optimizer: Groups, known: Afar, at: Sequence[tuple[int, float]], stood: Stood) -> np.ndarray:
    """Of each parameter in this step, where something is rounded at random."""
    if not any(group.random for _, standing in stood.parts for group in standing.groups):
        return np.empty(0, np.uint64)
    indices = np.flatnonzero(np.frombuffer(stood.active, np.uint8))
    own = np.array([known.identities[int(index)] for index in indices], np.uint64)
    of_rows = np.array([key_of(optimizer.param_groups[group]) for group, _ in at], np.uint64)
    return np.asarray(draws.parameter_key(of_rows[stood.row_of], own), np.uint64)


def without_zero(item: Item) -> Item:
    """The item as it is where its gradient has no memory yet."""
    return item if not item.zero else Item(item.name, item.rule, item.tensors, item.row, item.counter, item.codecs,
                                           item.extras)


def overlapping(addresses: np.ndarray, which: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether gradients that are zeroed lie over each other."""
    if len(which) < 2:
        return False
    begins = addresses[which]
    order = np.argsort(begins, kind="stable")
    ends = (begins + sizes)[order]
    return bool((ends[:-1] > begins[order][1:]).any())
