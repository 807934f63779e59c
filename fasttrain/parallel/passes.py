"""One backward pass after the other: gradients into buckets, full buckets on their way, and the end of a step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from fasttrain.dist.control import Control, Outcome, Pending
from fasttrain.dist.layout import FlatLayout
from fasttrain.dist.watcher import Watcher
from fasttrain.optim.local import local
from fasttrain.parallel.blame import Blame
from fasttrain.parallel.buckets import Bucket
from fasttrain.parallel.carried import bucket_of
from fasttrain.parallel.over_axes import Reach
from fasttrain.parallel.timeline import Timeline
from fasttrain.parallel.unfinished import Cause, Ending, at_backward_of, tell
from fasttrain.parallel.wires import Method, Sent, total

AGREED = ("the step", "the number of backward passes in it", "the checksum of its collectives",
          "whether there is any gradient", "whether optimizer.step() came without a synchronised backward pass")


class Passes:
    """What `fasttrain.parallel.reducer.Reducer` does within backward passes; see there."""

    method: Method
    idle: bool

    def __init__(self, named: Sequence[tuple[str, Tensor]], reach: Reach, layout: FlatLayout, static_graph: bool):
        self.names, self.params = [name for name, _ in named], [p for _, p in named]
        self.reach, self.wire, self.layout = reach, reach.wire, layout
        self.sequence = 0
        self.last: Outcome | None = None
        self.earlier: Outcome | None = None  # the one before
        self.timeline: Timeline | None = None
        self.syncing = True          # what the next backward pass does: `no_sync`
        self.joining = False         # within `join`: ranks without data answer the others
        self.stop = False            # this rank wishes to stop: travels with the next synchronised step
        self.loss: float | Tensor = 0.0  # of this rank: travels with the next synchronised step, to be added up
        self.sums: Pending | None = None  # what the last one has added up, on the device
        self._late_items = 0         # what all ranks had counted in the last one, until `step` divides by it
        self._items = 0              # what this rank has counted since the last one (`count`)
        self._open: bool | None = None  # within a backward pass: whether it is synchronised
        self._paused = False         # gradients only add up, and `reduce` says when they are complete
        self._backwards = 0          # since the last synchronised step
        self._counts, self._counting = [0] * len(named), static_graph
        self._control = Control(self.wire, len(named), AGREED, reach.across, reach.number, reach.ties)
        self._pending: Pending | None = None
        self._squares: tuple[Tensor, Tensor] | None = None
        self._arrivals: list[int] = []
        self._all_here = False       # after the last synchronised backward pass every gradient is the view of its slot
        self.blaming = Blame()
        self.broken, self._awaiting = Cause(), False  # what has ended a backward pass; whether its end is awaited
        self.buckets: list[Bucket] = []
        self._make_buckets(partial(bucket_of, reach))

    def _make_buckets(self, make: Callable[..., Bucket]) -> None:
        for bucket in self.buckets:
            bucket.release()
        self._index = {p: index for index, p in enumerate(self.params)}
        self._shapes = [p.shape for p in self.params]
        where: dict[int, tuple[Bucket, int]] = {}
        place = {name: index for index, name in enumerate(self.names)}
        self.buckets = []
        for plan in self.layout.buckets if not self.idle else ():
            indices = [place[slot.name] for slot in plan.slots]
            bucket = make(plan, [self.params[i] for i in indices], [self.names[i] for i in indices])
            for at, index in enumerate(indices):
                where[index] = bucket, at
            self.buckets.append(bucket)
        self._where = [where[index] for index in sorted(where)]  # of each parameter; none where nothing is sent

    def _arrive(self, index: int) -> None:
        """A gradient is there, as far as this backward pass goes."""
        if self._paused:
            return
        if self._open is None:
            self._begin()
        self._arrivals.append(index)
        if self._counting:
            self._counts[index] += 1
            return
        if self._left and self._left[index] > 1:
            self._left[index] -= 1
            return
        bucket, place = self._where[index]
        if not self._open:
            bucket.take(place, 1.0, False)
            return
        self._complete(index)

    def _complete(self, index: int) -> None:
        """A gradient is there for good: its bucket may be full now."""
        bucket, place = self._where[index]
        if self.blaming.on:
            self.blaming.look(self.names[index], local(self.params[index].grad))
        bucket.arrive(place, bucket.factor)
        if self.timeline is not None:
            self.timeline.look()
        if not bucket.waiting:
            self._send_ready()
        self.method.look()

    def _begin(self) -> None:
        """The first gradient of a backward pass."""
        self._backwards += 1
        self._arrivals = []
        self._left = list(self._counts) if any(self._counts) else []
        self.method.begin()
        if self.syncing:
            self._start()
        self._open = self.syncing
        self._await_the_end()

    def _await_the_end(self) -> None:
        if not self._awaiting:
            self._awaiting, self.broken = True, Cause()
            self.goes_on()
            Ending(self._ended, partial(_lost, weakref.ref(self)))

    def trouble(self, words: object) -> None:
        """A pass has ended with an exception before any gradient had come: the program may try again."""
        if isinstance(self.wire.watch, Watcher):
            self.wire.watch.in_trouble(words)

    def goes_on(self) -> None:
        """It does."""
        if isinstance(self.wire.watch, Watcher):
            self.wire.watch.go_on()

    def expect(self, outputs: Any) -> None:
        """A backward pass will begin at these outputs of the model: an exception before any gradient is seen, too."""
        at_backward_of(outputs, self.wire, partial(_begun, weakref.ref(self)))

    def _start(self) -> None:
        """A synchronised step begins."""
        self._read()
        if self._late_items and not self._adds_up():
            self._late_items = 0  # the gradients that they belong to were forgotten (`zero_grad`)
        self._works: list[Sent] = []
        self._squares = None
        for bucket in self.buckets:
            bucket.begin()
            bucket.factor = self.method.of(bucket.plan.group).factor
            if self.blaming.on:
                bucket.mend()
        if self.timeline is not None:
            self.timeline.begin()

    def _adds_up(self) -> bool:
        """Whether gradients of an earlier synchronised pass are there, which this one adds to."""
        return self.method.holding or any(bucket.holds(place) for bucket, place in self._where)

    def _send_ready(self) -> None:
        """Send, in the layout's order, every bucket that is full and whose turn it is."""
        while (turn := len(self._works)) < len(self.buckets) and not self.buckets[turn].waiting:
            self._works.append(self.method.send(turn, self.buckets[turn]))
            if self.timeline is not None:
                self.timeline.sent(turn, self._works[turn])

    def _ended(self) -> None:
        """Autograd is done."""
        self._awaiting = False
        if self._open:
            self._counting = False
            self._finish(late=False)
        self._open = None

    def _finish(self, late: bool) -> None:
        if self.timeline is not None:
            self.timeline.backward_ended()
        self._check_unchanged()
        used = [bucket.has(place) for bucket, place in self._where]
        self._all_here = all(used)
        for bucket in self.buckets[len(self._works) :]:
            bucket.close(bucket.factor)
        self._send_ready()
        measured = [work.wait() for work in self._works]
        squares, bad = total(self.reach.counted((bucket.plan.group for bucket in self.buckets), measured))
        same = [self.sequence, *((0, self.method.checksum, 1, 0) if self.joining else
                                 (self._backwards, self.method.checksum, any(used), late))]
        items, loss = (self._items, self.loss) if self.reach.speaks else (0, 0.0)
        self._pending = self._control.send(list(map(int, same)), squares, bad, items, self.stop, used, loss)
        self.sums = self._pending
        self._counted = self._items > 0
        self.sequence, self._backwards, self._items = self.sequence + 1, 0, 0
        self._squares = self._pending.squares, self._pending.nonfinite
        if self.timeline is not None:
            self.timeline.ended()
        if self.wire.device.type == "cpu" or not all(used) or late or self._counted or self.blaming.on:
            blaming = self.blaming.on
            outcome = self._read()
            if blaming:
                self.blaming.ended(self.reach, outcome.nonfinite)
            for (bucket, place), had, ranks in zip(self._where, used, outcome.used, strict=True):
                if ranks and not had:
                    bucket.bind(place)
            used = [ranks > 0 for ranks in outcome.used]
            if late and any(outcome.used):
                raise RuntimeError("an optimizer steps gradients that were accumulated under no_sync() and never "
                                   "reduced, on every rank: run the last backward pass of a step outside of no_sync()")
        for bucket in self.buckets:
            bucket.reduced()
        self.method.ended(used)

    def _read(self) -> Any:
        """What the ranks did: at once on the CPU, a step later on a GPU, which is not waited for."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self.earlier, self.last = self.last, pending.read()
            self._late_items += self.last.tokens  # of several synchronised passes of a step
            if not self.blaming.on:
                self.blaming.on = self.last.nonfinite > 0
        return self.last

    @property
    def known(self) -> Outcome | None:
        """The newest outcome that every rank has read, to decide by alike: on a GPU that of the step before the last.

        There a rank reads a step's own outcome only if it has to, which others need not have.
        """
        return self.last if self.wire.device.type == "cpu" or self._pending is not None else self.earlier

    def _check_unchanged(self) -> None:
        for name, p, shape in zip(self.names, self.params, self._shapes, strict=True):
            if not p.requires_grad or p.shape != shape:
                how = "resized" if p.requires_grad else "frozen"
                raise RuntimeError(f"{name} was {how} after it was wrapped: wrap the model again, on every rank")


def _begun(passes: weakref.ref[Passes], _: Tensor) -> None:
    if (self := passes()) is not None:
        self._await_the_end()


def _lost(passes: weakref.ref[Passes], cause: Cause) -> None:
    """A backward pass came to no end."""
    if (self := passes()) is None:
        return
    self._awaiting, self.broken = False, cause
    if self._open is not None:
        tell(self.wire, cause)
    else:
        self.trouble(cause)
