"""Steps that the host drives on a GPU, over items that are the same from step to step.

Of these only rows of coefficients and addresses of gradients change, and only these are looked at: tables are
described, built and sent once (`fasttrain.kernels.launches` finds out at every step what to send of which items).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fasttrain.kernels import kept_table, launches, table
from fasttrain.kernels.item import Item
from fasttrain.kernels.launches import Launches
from fasttrain.kernels.place import Place
from fasttrain.kernels.resident import making
from fasttrain.kernels.table import Kind


class Backend(Protocol):
    """What a backend does for it, on one device. `start` queues one launch for each (kind, items) in its order; `rows`
    are the ends of their rows, which tell what need not be done.
    """

    place: Place

    def chunk_of(self, items: Sequence[Item]) -> int: ...

    def use(self, kind: Kind) -> None: ...

    def start(self, groups: Sequence[tuple[Kind, list[Item]]], made: Launches, clips: Sequence[bool]) -> None: ...


@dataclass(frozen=True)
class Group:
    """Items of one launch.

    Attributes:
        places: which of all items.
        rows: which of all rows they read.
        own_row: for each item, one of `rows`.
        random: the operands that draw; then every item has a row of its own, with its keys.
    """

    kind: Kind
    items: list[Item]
    places: np.ndarray
    rows: np.ndarray
    own_row: np.ndarray
    random: list[int]

    def live(self, rows: Sequence[Sequence[float]], keys: np.ndarray) -> np.ndarray:
        """Its rows, in the type that they are computed in."""
        wide = self.items[0].dtype.itemsize == 8
        made = np.array([rows[row] for row in self.rows]).astype(np.float64 if wide else np.float32)
        if not self.random:
            return made
        return np.concatenate([made[self.own_row], kept_table.words_of(keys[self.places], self.random)], 1)


class Standing:
    """The launches over items on one device.

    Arguments:
        items: flat ones. Their rows, keys and gradients' addresses are not read.
        row_of: which of the rows each reads.
    """

    def __init__(self, backend: Backend, items: Sequence[Item], row_of: np.ndarray) -> None:
        self.backend, self.groups = backend, list[Group]()
        index = {id(item): place for place, item in enumerate(items)}
        for kind, own in table.grouped(items).items():
            places = np.array([index[id(item)] for item in own], np.int64)
            rows, own_row = np.unique(row_of[places], return_inverse=True)
            kept_table.check_wide(own[0])
            random = [] if own[0].plain or own[0].dtype.itemsize == 8 else kept_table.random_operands(kind.codecs)
            self.groups.append(Group(kind, own, places, rows, own_row.reshape(-1), random))
        self.made: Launches | None = None
        self.stream: int | None = None

    @property
    def launches(self) -> int:
        return sum(any(item.tensors[0].numel() for item in group.items) for group in self.groups)

    def ready(self, rows: Sequence[Sequence[float]], keys: np.ndarray, addresses: np.ndarray) -> Callable[[], None]:
        """Send what changed, and return what starts the launches.

        Arguments:
            keys: uint64, of each item in this step (`fasttrain.precision.draws`).
            addresses: int64, of each item's gradient.

        Raises:
            torch.OutOfMemoryError: there is no memory left; nothing was started.
        """
        place = self.backend.place
        own = [group.live(rows, keys) for group in self.groups]
        moving = [addresses[group.places] for group in self.groups]
        with place.guard(), making("the tables of a step", self.groups[0].kind.device):
            if self.made is None or self.stream != place.stream():
                self.made, self.stream = self._prepared(own, moving), place.stream()
            else:
                self.made.on_device.update(place, launches.live(own, self.made.gradients, moving))
        made, chosen = self.made, [(group.kind, group.items) for group in self.groups]
        clips = [not group.items[0].plain and any(rows[row][-3] != np.inf for row in group.rows)
                 for group in self.groups]
        return lambda: self.backend.start(chosen, made, clips)

    def _prepared(self, rows: Sequence[np.ndarray], moving: Sequence[np.ndarray]) -> Launches:
        fixed = []
        for group in self.groups:
            kind: Any = table if group.items[0].plain else kept_table
            described = kind.describe(group.items, range(len(group.items)) if group.random else group.own_row)
            described[:, 1] = 0
            fixed.append(described)
        return launches.prepare(self.backend.place, [(group.kind, group.items) for group in self.groups], fixed, rows,
                                moving, self.backend.chunk_of, self.backend.use)
