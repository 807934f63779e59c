"""The tables of a step that a device drives, on CUDA and in Triton alike: what is sent once, and what may change.

Three stretches of memory: the *numbers*, of which a refresh sends what changed; the *tables*, of which an update sends
the addresses of gradients; and the rows, flags and whatever else the kernels write.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fasttrain.kernels import driven_plan as plan
from fasttrain.kernels import launches, native
from fasttrain.kernels.driven_plan import Group
from fasttrain.kernels.item import Item, flat
from fasttrain.kernels.moved import Gradients
from fasttrain.kernels.place import Place
from fasttrain.kernels.prologue import Row
from fasttrain.kernels.resident import Resident, making


class Tabled:
    """A step that is ready; what queues it is of the backend.

    Arguments:
        chunk_of: elements of a chunk of the items of one launch.
        programs: more that is sent with the numbers once, an array for each group.
        room: bytes for the kernels to write, beside the rows; they follow these.
        counted: addresses of counts that another part of the step counts.
    """

    launches = 0

    def __init__(self, place: Place, items: Sequence[Item], rows: Sequence[Row], row_of: Sequence[int],
                 chunk_of: Callable[[Sequence[Item]], int], programs: Callable[[Group], np.ndarray] | None = None,
                 room: Callable[[Sequence[Group]], int] = lambda groups: 0,
                 counted: frozenset[int] = frozenset()) -> None:
        self.place, self.device = place, items[0].tensors[0].device
        self.item_count, self.row_count, self.counted = len(items), len(rows), counted
        self.groups = plan.grouped(items, rows, row_of)
        words = plan.words(self.groups, rows, self.device)
        self.sealed = False
        with making("the tables of a step", self.device), place.guard():
            self.made, self.end = plan.laid_out(self.groups)
            self.work = place.empty(self.end + room(self.groups))
            self.base = self.work.data_ptr()
            self.keyed = plan.keyed(self.groups, self.made, self.base, rows)
            self.counts = plan.counts(self.groups, self.made, self.base, rows, counted)
            self.drawn = _drawn(rows)
            self.numbers = Resident(place, [*words, self.keyed], [programs(group) for group in self.groups] if programs
                                    else [])
            described = [plan.described(group, group.items) for group in self.groups]
            self.fixed = [fixed for fixed, _ in described]
            built = [launches.chunked(group.items, chunk_of(group.items), fixed)
                     for group, fixed in zip(self.groups, self.fixed, strict=True)]
            self.chunks = [table for table, _ in built]
            self.columns = [column for _, column in built]
            self.tables = Resident(place, self._live([moving for _, moving in described]),
                                   [*self.chunks, self.counts, *self.more()])
            self.pinned = place.pinned(max(len(self.tables.seen), 1))
            self.sums = torch.zeros(len(items), 0, dtype=torch.float64, device=self.device)
        self.groups = [replace(group, items=[_without_gradient(item) for item in group.items]) for group in self.groups]
        self.places = [np.array(group.places, np.int64) for group in self.groups]
        self.written = native.Written([
            tensor for group in self.groups for item in group.items for tensor in item.written
            if tensor is not item.counter and tensor is not item.tensors[1]])
        self.zeroed = [weakref.ref(item.tensors[1]) for item in items if item.zero]

    def more(self) -> list[np.ndarray]:
        """Tables of the backend's own, made when the numbers have addresses."""
        return []

    def launch(self) -> None:
        """As `fasttrain.kernels.driven.Driven`."""
        launch([self])

    def make(self) -> None:
        """Start what makes the rows."""
        raise NotImplementedError

    def step(self) -> None:
        """Start what steps the items."""
        raise NotImplementedError

    def count(self) -> None:
        """Start what counts."""
        raise NotImplementedError

    def refresh(self, rows: Sequence[Row]) -> None:
        """As `fasttrain.kernels.driven.Driven`."""
        if len(rows) != self.row_count:
            raise ValueError(f"{len(rows)} rows are given for a step of {self.row_count}: make it again")
        words = plan.words(self.groups, rows, self.device)
        if (drawn := _drawn(rows)) != self.drawn:  # these tables have a line for each item, and are seldom others
            keyed = plan.keyed(self.groups, self.made, self.base, rows)
            counts = plan.counts(self.groups, self.made, self.base, rows, self.counted)
            if counts.tobytes() != self.counts.tobytes():
                raise ValueError("rows have other counts of draws than the step was made with: make it again")
            self.keyed, self.drawn = keyed, drawn
        with self.place.guard():
            self.numbers.update(self.place, [*words, self.keyed])

    def update(self, items: Sequence[Item]) -> None:
        """As `fasttrain.kernels.driven.Driven`."""
        if len(items) != self.item_count:
            raise ValueError(f"{len(items)} items are given for a step of {self.item_count}: make it again")
        moving = []
        for group, fixed in zip(self.groups, self.fixed, strict=True):
            new = [items[place] for place in group.places]
            described, addresses = plan.described(group, new)
            for index, item in enumerate(new):
                _check(item, group.items[index], bool((described[index] == fixed[index]).all()))
            moving.append(addresses)
        self._moved(moving)
        self.zeroed = [weakref.ref(item.tensors[1]) for item in items if item.zero]

    def move(self, grads: Gradients) -> None:
        """As `fasttrain.kernels.driven.Driven`; whoever compared them also tells autograd of those that are zeroed."""
        self._moved([grads.addresses[places] for places in self.places])
        self.zeroed = []

    def _moved(self, moving: Sequence[np.ndarray]) -> None:
        live = self._live(moving)
        with self.place.guard():
            capturing = self.place.capturing()
            if not (capturing or self.sealed):
                self.tables.update(self.place, live)
            elif self.tables.record(self.place, live, None if self.sealed else self.pinned):
                self.sealed = True

    def _live(self, moving: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [column.addresses(own) for column, own in zip(self.columns, moving, strict=True)]


def _drawn(rows: Sequence[Row]) -> list[tuple[Any, ...]]:
    """What the rows say of random draws: where they are counted, and the seed."""
    return [(row.seed, *(() if row.draws is None else (row.draws.data_ptr(), row.draws.dtype))) for row in rows]


def _without_gradient(item: Item) -> Item:
    """The item with what its gradient is like in the place of that, which nobody should keep alive between steps."""
    p, g, *others = item.tensors
    return replace(item, tensors=(p, torch.empty_like(g, device="meta"), *others))


def _check(item: Item, before: Item, same: bool) -> None:
    """An item differs from another in the address of its gradient alone."""
    alike = all(new.dtype == old.dtype and new.shape == old.shape and new.device == before.tensors[0].device
                for new, old in zip(item.tensors, before.tensors, strict=True))
    if not (same and alike and item.rule is before.rule and item.codecs == before.codecs and flat(item)):
        raise ValueError(f"{item.name} is not what the step was made for, or its gradient is laid out in another way "
                         f"({tuple(item.tensors[1].shape)}, {item.tensors[1].dtype}): make it again")


def launch(parts: Sequence[Tabled]) -> None:
    """One step: every row is made before anything is stepped, and all is stepped before anything is counted, since rows
    of one part may read what another counts.
    """
    for phase in (Tabled.make, Tabled.step, Tabled.count):
        for part in parts:
            with part.place.guard():
                getattr(part, phase.__name__)()
    for part in parts:
        part.written.increment()
    zeroed = [gradient for part in parts for reference in part.zeroed if (gradient := reference()) is not None]
    if zeroed:
        torch.autograd.graph.increment_version(zeroed)


Make = Callable[[Sequence[Item], Sequence[Row], Sequence[int], frozenset[int]], Tabled]


def together(items: Sequence[Item], rows: Sequence[Row], row_of: Sequence[int],
             make: Sequence[tuple[Sequence[int], Make]]) -> Any:
    """The step of parts, each (which of the items, what makes it)."""
    parts: list[tuple[Sequence[int], Tabled]] = []
    counted: frozenset[int] = frozenset()
    for places, one in make:
        part = one([items[place] for place in places], rows, [row_of[place] for place in places], counted)
        counted |= set(part.counts[:, 0].tolist())
        parts.append((places, part))
    return parts[0][1] if len(parts) == 1 else Several(parts)


class Several:
    """A step of several parts: of several backends, say.

    Arguments:
        parts: which of the items, and their step.
    """

    def __init__(self, parts: Sequence[tuple[Sequence[int], Tabled]]) -> None:
        self.parts = list(parts)
        self.launches = sum(step.launches for _, step in parts)
        count, device = sum(len(places) for places, _ in parts), parts[0][1].sums.device
        most = max(step.sums.shape[1] for _, step in parts)
        self.sums = torch.zeros(count, most, dtype=torch.float64, device=device)
        self.places = [torch.tensor(places, device=device) for places, _ in parts]

    def launch(self) -> None:
        launch([step for _, step in self.parts])
        for places, (_, step) in zip(self.places, self.parts, strict=True):
            if step.sums.shape[1]:
                self.sums[:, : step.sums.shape[1]].index_copy_(0, places, step.sums)

    def refresh(self, rows: Sequence[Row]) -> None:
        for _, step in self.parts:
            step.refresh(rows)

    def update(self, items: Sequence[Item]) -> None:
        for places, step in self.parts:
            step.update([items[place] for place in places])

    def move(self, grads: Gradients) -> None:
        for places, step in self.parts:
            step.move(grads.take(places))
