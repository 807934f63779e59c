"""Host memory in the place of a GPU's: copies between it and the host that are late, early, or in between."""

from __future__ import annotations

import random

import torch


class Event:
    """Of the copies of one call."""

    def __init__(self, link, way):
        self.link, self.way = link, way


class FakeLink:
    """As `fasttrain.kernels.link.Link`; the GPU's current stream does everything at once. What is being copied, and
    where to, must not be written before somebody has waited.

    Arguments:
        pace: "late": copies are made when somebody waits for them; "early": at once; "mixed": some now, some later.

    Attributes:
        most: how many calls of each way were under way together at most, as far as the host knew.
        room: bytes that may still be pinned.
    """

    device = torch.device("cpu")

    def __init__(self, pace="late", room=1 << 40):
        self.pace, self.room = pace, room
        self.queues = {"down": [], "up": []}
        self.known = {"down": [], "up": []}  # events that the host has not waited for
        self.most = {"down": 0, "up": 0}
        self.pinned_bytes, self.moved, self.calls = 0, {"down": 0, "up": 0}, {"down": 0, "up": 0}
        self.random = random.Random(7)

    def mark(self):
        return Event(self, "main")

    def down(self, pairs, after):
        return self._queue("down", pairs, after)

    def up(self, pairs, after):
        return self._queue("up", pairs, after)

    def _queue(self, way, pairs, after):
        assert {event.way for event in after} == {"main"}, "nothing says when the tensors are at rest"
        for to, source in pairs:
            assert (to.shape, to.dtype) == (source.shape, source.dtype)
            torch.autograd.graph.increment_version(to)
            self.moved[way] += source.nbytes
        event = Event(self, way)
        self.calls[way] += 1
        versions = [(to._version, source._version) for to, source in pairs]
        self.queues[way].append((pairs, event, versions))
        self.known[way].append(event)
        self.most[way] = max(self.most[way], len(self.known[way]))
        if self.pace == "early":
            self._run(way, event)
        elif self.pace == "mixed":
            self.progress()
        return event

    def progress(self):
        for way in ("down", "up"):
            if self.queues[way] and self.random.random() < 0.5:
                self._run(way, self.queues[way][0][1])

    def _run(self, way, event):
        while any(queued is event for _, queued, _ in self.queues[way]):
            pairs, _, versions = self.queues[way].pop(0)
            for (to, source), known in zip(pairs, versions, strict=True):
                assert (to._version, source._version) == known, "written while a copy was under way"
                to.data.copy_(source.data)

    def hold(self, event):
        self._run(event.way, event)

    def wait(self, event):
        self._run(event.way, event)
        waiting = self.known[event.way]
        if any(other is event for other in waiting):
            del waiting[:next(i for i, other in enumerate(waiting) if other is event) + 1]

    def pinned(self, size):
        self.room -= size
        if self.room < 0:
            raise RuntimeError("cudaHostRegister returned error 2")
        self.pinned_bytes += size
        return torch.full((size,), 0x5A, dtype=torch.uint8)
