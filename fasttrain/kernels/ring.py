"""Small arrays on their way to a GPU: a ring of slots in pinned memory, each used again only after its event.

A slot's event is recorded behind the copy from it, on the stream of the copy. Where the next slot is still in use the
ring grows, to `MOST` slots; beyond, the host waits for the oldest copy, so that it is at most so far ahead.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrain.kernels.place import Place

FEWEST, MOST = 4, 64  # slots
SMALLEST = 4096  # bytes of a slot, which doubles when more is to be sent


@dataclass
class Sent(threading.local):
    """What this thread has sent to devices, and how often it waited for a slot."""

    copies: int = 0
    bytes: int = 0
    waits: int = 0

    def now(self) -> tuple[int, int, int]:
        return self.copies, self.bytes, self.waits


sent = Sent()


@dataclass
class Slot:
    event: Any
    memory: Tensor | None = None
    used: bool = False
    words: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))  # of the memory


class Ring:
    """The slots of one device."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.slots = [Slot(place.event()) for _ in range(FEWEST)]
        self.next = 0
        self.spares: dict[int, Tensor] = {}  # pinned, by size, for copies in captures
        self.recorded: list[Tensor] = []  # what copies in graphs read
        self.lock = threading.Lock()

    def send(self, data: np.ndarray, to: Tensor) -> None:
        """Copy bytes to as many in device memory, ordered on the current stream.

        Raises:
            RuntimeError: a CUDA graph is being captured, whose replays would copy what the slot holds by then.
        """
        if self.place.capturing():
            raise RuntimeError("the tables of a step have to be sent to the GPU while a CUDA graph is captured: take a "
                               "step with the same parameters and gradients before the capture")
        with self.lock:
            slot = self._free(len(data))
            assert slot.memory is not None
            slot.words[: len(data)] = data
            self.place.copy(to, slot.memory[: len(data)])
            self.place.record(slot.event)
            slot.used = True
        sent.copies += 1
        sent.bytes += len(data)

    def spare(self, size: int) -> None:
        """Have pinned memory for a copy of so many bytes in a capture, where none should be made."""
        with self.lock:
            if size not in self.spares:
                self.spares[size] = self.place.pinned(size)

    def record(self, data: np.ndarray, to: Tensor) -> None:
        """Make a copy of bytes a part of the CUDA graph that is being captured. Its replays read the memory that they
        are copied from, so that it is kept for good, and nobody writes it again.
        """
        with self.lock:
            memory = self.spares.pop(len(data)) if len(data) in self.spares else self.place.pinned(len(data))
            self.recorded.append(memory)
        memory.numpy()[:] = data
        self.place.copy(to, memory)

    def _free(self, size: int) -> Slot:
        slot = self.slots[self.next]
        if slot.used and not slot.event.query():
            if len(self.slots) < MOST:
                slot = Slot(self.place.event())
                self.slots.insert(self.next, slot)
            else:
                slot.event.synchronize()
                sent.waits += 1
        self.next = (self.next + 1) % len(self.slots)
        if len(slot.words) < size:
            slot.memory = self.place.pinned(max(SMALLEST, 1 << (size - 1).bit_length()))
            slot.words = slot.memory.numpy()
        return slot


rings: dict[torch.device, Ring] = {}
lock = threading.Lock()


def ring_of(place: Place) -> Ring:
    with lock:
        if place.device not in rings:
            rings[place.device] = Ring(place)
        return rings[place.device]


def upload(place: Place, data: np.ndarray) -> Tensor:
    """An array's bytes in device memory of their own, ordered on the current stream; the host does not wait."""
    flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    memory = place.empty(len(flat))
    if len(flat):
        ring_of(place).send(flat, memory)
    return memory
