"""Tables that stay in the memory of a device, and the little of them that a step changes.

What a launch reads lies in one stretch of memory. Its first part is *live*: rows of coefficients, and the column of the
gradients' addresses, which `zero_grad` changes at nearly every step. The rest is sent once. A step sends the stretch
from the first word that changed to the last, in one copy, or nothing.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from fasttrain.kernels.place import Place
from fasttrain.kernels.ring import ring_of
from fasttrain.kernels.table import ALIGNED

TABLES = 1024  # kept, by default
ROOM = 64 << 20  # bytes that they may take, but for the last
WORD = 8  # bytes


class Parcel:
    """Arrays that go to the device in one copy, each at a multiple of 16 bytes."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []
        self.bytes = 0

    def add(self, part: np.ndarray) -> int:
        """Add an array and return where it begins."""
        begin = self.bytes
        self.parts.append(np.ascontiguousarray(part).reshape(-1).view(np.uint8))
        self.bytes += -(-part.nbytes // ALIGNED) * ALIGNED
        self.parts.append(np.zeros(self.bytes - begin - part.nbytes, np.uint8))
        return begin

    def data(self) -> np.ndarray:
        return np.concatenate(self.parts) if self.parts else np.empty(0, np.uint8)


def packed(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, list[int]]:
    """The arrays one after the other, and where each begins."""
    parcel = Parcel()
    begins = [parcel.add(part) for part in parts]
    return parcel.data(), begins


@dataclass(frozen=True)
class Column:
    """Addresses in memory that moves: of each row of a table, the number of its tensor, and how far behind the tensor's
    address its own lies.
    """

    tensor: np.ndarray
    offset: np.ndarray

    def addresses(self, pointers: np.ndarray) -> np.ndarray:
        return pointers[self.tensor] + self.offset


class Resident:
    """Arrays in device memory: the live ones, of which later ones have the same sizes, and the others.

    Torch frees the memory for later work of the stream that it was made on, so it is used on that stream only.

    Arguments:
        apart: in a capture the copy becomes part of the graph (`Ring.record`); nothing may be sent there later.

    Attributes:
        live, fixed: the address of each array.
    """

    def __init__(self, place: Place, live: Sequence[np.ndarray], fixed: Sequence[np.ndarray],
                 apart: bool = False) -> None:
        data, begins = packed([*live, *fixed])
        self.seen = packed(live)[0]
        self.memory = place.empty(len(data))
        if len(data) and apart and place.capturing():
            ring_of(place).record(data, self.memory)
        elif len(data):
            ring_of(place).send(data, self.memory)
        addresses = [self.memory.data_ptr() + begin for begin in begins]
        self.live, self.fixed = addresses[: len(live)], addresses[len(live) :]
        self.sizes = [part.nbytes for part in (*live, *fixed)]

    def view(self, part: Literal["live", "fixed"], index: int, dtype: torch.dtype) -> Tensor:
        """One of the arrays, flat."""
        address = (self.live if part == "live" else self.fixed)[index]
        size = self.sizes[index if part == "live" else len(self.live) + index]
        begin = address - self.memory.data_ptr()
        return self.memory[begin : begin + size].view(dtype)

    def update(self, place: Place, live: Sequence[np.ndarray]) -> None:
        """Send what is not as before."""
        data, first, last = self._changed(live)
        if last:
            ring_of(place).send(data[first:last], self.memory[first:last])
            self.seen = data

    def record(self, place: Place, live: Sequence[np.ndarray], pinned: Tensor | None) -> bool:
        """In a capture: make the copy of what is not as before a part of the graph. Whether there is one.

        Arguments:
            pinned: memory of the host, as long as the live arrays, which nobody writes from then on. None: it is part
                of a graph already.

        Raises:
            RuntimeError: something changed, and there is no such memory.
        """
        data, first, last = self._changed(live)
        if not last:
            return False
        if pinned is None:
            raise RuntimeError("the addresses of gradients are part of a CUDA graph, whose replays copy them, and "
                               "others are given: capture the step again")
        pinned.numpy()[first:last] = data[first:last]
        place.copy(self.memory[first:last], pinned[first:last])
        self.seen = data
        return True

    def _changed(self, live: Sequence[np.ndarray]) -> tuple[np.ndarray, int, int]:
        """The live bytes, and from where to where they are not as before; to 0 if they are."""
        data = packed(live)[0]
        changed = np.flatnonzero(data.view(np.int64) != self.seen.view(np.int64))
        return (data, int(changed[0]) * WORD, (int(changed[-1]) + 1) * WORD) if len(changed) else (data, 0, 0)


Entry = TypeVar("Entry")


class Tables(Generic[Entry]):
    """What is kept on devices for the next step, the last used at the end."""

    def __init__(self, most: int = TABLES) -> None:
        self.most = most
        self.known: OrderedDict[tuple[Any, ...], Entry] = OrderedDict()
        self.sizes: dict[tuple[Any, ...], int] = {}
        self.bytes = 0
        self.lock = threading.Lock()

    def get(self, key: tuple[Any, ...]) -> Entry | None:
        with self.lock:
            return self.known.get(key)

    def keep(self, key: tuple[Any, ...], entry: Entry, size: int = 0) -> None:
        """Keep what has so many bytes; drop what was not used for longest where it becomes too much."""
        with self.lock:
            self.bytes += size - self.sizes.get(key, 0)
            self.known[key], self.sizes[key] = entry, size
            self.known.move_to_end(key)
            while len(self.known) > self.most or (self.bytes > ROOM and len(self.known) > 1):
                oldest, _ = self.known.popitem(last=False)
                self.bytes -= self.sizes.pop(oldest)


def patched(tables: Tables[Resident], place: Place, key: tuple[Any, ...], table: np.ndarray) -> Tensor:
    """A table of 64-bit words in device memory, of which only what is not as at the last call with this key is sent:
    from the first word that changed to the last.

    Arguments:
        key: tells tables from others, beside their sizes and the current stream. No two that are in use at a time
            may have one key.

    Raises:
        RuntimeError: a CUDA graph is being captured, whose replays would read what later calls send.
    """
    with place.guard():
        if place.capturing():
            ring_of(place).send(table.reshape(-1).view(np.uint8), place.empty(table.nbytes))  # says so
        key = (place.device, place.stream(), table.shape, *key)
        known = tables.get(key)
        if known is None:
            known = Resident(place, [table], [])
        else:
            known.update(place, [table])
        tables.keep(key, known, known.memory.nbytes)
    return known.view("live", 0, torch.int64).view(table.shape)


@contextmanager
def making(what: str, device: torch.device) -> Iterator[None]:
    """Around what takes memory before a step writes anything: where there is none, an error says what to do."""
    try:
        yield
    except RuntimeError as error:  # torch has a class for GPUs' memory only; the host's and the driver's have a text
        if "out of memory" not in str(error).lower().replace("_", " "):
            raise
        raise torch.OutOfMemoryError(
            f"there is no memory left for {what} on {device}, and no parameter was stepped: take a smaller batch, free "
            "what is cached (torch.cuda.empty_cache()), or keep parameters and states in fewer bytes (docs/storage.md)."
            f" {error}") from error
