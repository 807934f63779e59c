"""The tables of a step that a device drives, on CUDA and in Triton alike: what is sent once, and what may change.

Three stretches of memory: the *numbers*, of which a refresh sends what changed; the *tables*, of which an update sends
the addresses of gradients; and the rows, flags and whatever else the kernels write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fasttrain.kernels import driven_plan as plan
from fasttrain.kernels import launches
from fasttrain.kernels.driven_plan import Group
from fasttrain.kernels.item import Item, flat
from fasttrain.kernels.place import Place
from fasttrain.kernels.prologue import Row
from fasttrain.kernels.resident import Resident, making


class Tabled:
    """A step that is ready; what queues it is of the backend.

    Arguments:
        chunk_of: elements of a chunk of the items of one launch.
        programs: more that is sent with the numbers once, an array for each group.
        room: bytes for the kernels to write, beside the rows; they follow these.
    """

    launches = 0

    def __init__(self, place: Place, items: Sequence[Item], rows: Sequence[Row], row_of: Sequence[int],
                 chunk_of: Callable[[Sequence[Item]], int], programs: Callable[[Group], np.ndarray] | None = None,
                 room: Callable[[Sequence[Group]], int] = lambda groups: 0) -> None:
        self.place, self.device = place, items[0].tensors[0].device
        self.items = list(items)
        self.row_count = len(rows)
        self.groups = plan.grouped(items, rows, row_of)
        words = plan.words(self.groups, rows, self.device)
        self.sealed = False
        with making("the tables of a step", self.device), place.guard():
            self.made, self.end = plan.laid_out(self.groups)
            self.work = place.empty(self.end + room(self.groups))
            self.base = self.work.data_ptr()
            self.keyed = plan.keyed(self.groups, self.made, self.base, rows)
            self.counts = plan.counts(self.groups, self.made, self.base, rows)
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
        self.written = [tensor for item in items for tensor in item.written if tensor is not item.counter]

    def more(self) -> list[np.ndarray]:
        """Tables of the backend's own, made when the numbers have addresses."""
        return []

    def launch(self) -> None:
        """As `fasttrain.kernels.driven.Driven`."""
        with self.place.guard():
            self.queue()
        torch.autograd.graph.increment_version(self.written)

    def queue(self) -> None:
        """Start the kernels."""
        raise NotImplementedError

    def refresh(self, rows: Sequence[Row]) -> None:
        """As `fasttrain.kernels.driven.Driven`."""
        if len(rows) != self.row_count:
            raise ValueError(f"{len(rows)} rows are given for a step of {self.row_count}: make it again")
        words = plan.words(self.groups, rows, self.device)
        keyed = plan.keyed(self.groups, self.made, self.base, rows)
        if plan.counts(self.groups, self.made, self.base, rows).tobytes() != self.counts.tobytes():
            raise ValueError("rows have other counts of draws than the step was made with: make it again")
        with self.place.guard():
            self.numbers.update(self.place, [*words, keyed])

    def update(self, items: Sequence[Item]) -> None:
        """As `fasttrain.kernels.driven.Driven`."""
        if len(items) != len(self.items):
            raise ValueError(f"{len(items)} items are given for a step of {len(self.items)}: make it again")
        moving = []
        for group, fixed in zip(self.groups, self.fixed, strict=True):
            new = [items[place] for place in group.places]
            described, addresses = plan.described(group, new)
            for index, item in enumerate(new):
                _check(item, group.items[index], bool((described[index] == fixed[index]).all()))
            moving.append(addresses)
        live = self._live(moving)
        with self.place.guard():
            capturing = self.place.capturing()
            if not (capturing or self.sealed):
                self.tables.update(self.place, live)
            elif self.tables.record(self.place, live, None if self.sealed else self.pinned):
                self.sealed = True

    def _live(self, moving: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [column.addresses(own) for column, own in zip(self.columns, moving, strict=True)]


def _check(item: Item, before: Item, same: bool) -> None:
    """An item differs from another in the address of its gradient alone."""
    alike = all(new.dtype == old.dtype and new.shape == old.shape and new.device == old.device
                for new, old in zip(item.tensors, before.tensors, strict=True))
    if not (same and alike and item.rule is before.rule and item.codecs == before.codecs and flat(item)):
        raise ValueError(f"{item.name} is not what the step was made for, or its gradient is laid out in another way "
                         f"({tuple(item.tensors[1].shape)}, {item.tensors[1].dtype}): make it again")


class Several:
    """Steps of several backends that are queued together.

    Arguments:
        parts: which of the items, and their step.
    """

    def __init__(self, parts: Sequence[tuple[Sequence[int], Any]]) -> None:
        self.parts = list(parts)
        self.launches = sum(step.launches for _, step in parts)
        count = sum(len(places) for places, _ in parts)
        self.sums = torch.zeros(count, 0, dtype=torch.float64, device=parts[0][1].sums.device)

    def launch(self) -> None:
        for _, step in self.parts:
            step.launch()

    def refresh(self, rows: Sequence[Row]) -> None:
        for _, step in self.parts:
            step.refresh(rows)

    def update(self, items: Sequence[Item]) -> None:
        for places, step in self.parts:
            step.update([items[place] for place in places])
