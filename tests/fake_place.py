"""Host memory in the place of a GPU's, for the CUDA backend: torch's side of a device, and what was asked of it."""

from __future__ import annotations

import contextlib

import torch


class Event:
    """It has happened as soon as it is recorded, unless the place is behind."""

    def __init__(self, place):
        self.place, self.happened = place, True

    def query(self):
        return self.happened

    def synchronize(self):
        self.place.waited += 1
        self.place.catch_up(self)


class FakePlace:
    """As `fasttrain.kernels.place.Place`.

    Attributes:
        uploads: the bytes of every copy to the device.
        behind: copies stay queued until somebody waits, or `catch_up`.
        room: bytes that may still be allocated.
        graph: a graph is being captured; copies are done at once, and again by `replay`.
    """

    STREAM = 0x5EA

    def __init__(self, device=torch.device("cpu")):  # noqa: B008
        self.device = device
        self.uploads, self.queue, self.guards, self.pins = [], [], 0, 0
        self.behind = self.graph = False
        self.waited, self.room = 0, 1 << 40
        self.copies = []  # of the graph

    def ordinal(self):
        return self.device.index or 0

    @contextlib.contextmanager
    def guard(self):
        self.guards += 1
        yield
        self.guards -= 1

    def stream(self):
        assert self.guards, "not the current device"
        return self.STREAM + self.ordinal()

    def capturing(self):
        return self.graph

    def empty(self, size):
        self.room -= size
        if self.room < 0:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
        return torch.full((size,), 0xA5, dtype=torch.uint8)  # as memory that was used before

    def pinned(self, size):
        self.pins += 1
        return torch.full((size,), 0x5A, dtype=torch.uint8)

    def copy(self, to, source):
        assert len(to) == len(source) > 0
        self.uploads.append(len(source))
        if self.graph:
            to.copy_(source)
            self.copies.append((to, source))
            return
        self.queue.append((to, source))

    def event(self):
        return Event(self)

    def record(self, event):
        event.happened = False
        self.queue.append((event,))
        if not self.behind:
            self.catch_up()

    def replay(self):
        """The copies that are part of graphs."""
        for to, source in self.copies:
            to.copy_(source)

    def catch_up(self, event=None):
        """Do what is queued, up to an event."""
        while self.queue:
            done = self.queue.pop(0)
            if len(done) == 2:
                done[0].copy_(done[1])
            else:
                done[0].happened = True
                if done[0] is event:
                    return
