"""Buckets between a GPU and the host: at most one on its way down, and one up.

Gradients land in two slots: one is filled while the CPU reads the other. Parameters are sent from where the CPU steps
them, which is written again only when the copy has gone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttrain.kernels.link import Link, Pairs
from fasttrain.optim.pinned import Array, pin
from fasttrain.optim.report import StepReport


class Member(NamedTuple):
    """A parameter in a bucket."""

    number: int
    grad: Tensor
    landed: Array


@dataclass
class Bucket:
    """Gradients of one device that travel together; those of the host's own parameters (no link) stay where they are.

    Attributes:
        after: events behind which the gradients are complete and nobody reads the parameters.
        more: what else comes down with them.
        turn: the number of its slot.
        views: the gradients on the host, once it has set out.
    """

    link: Link | None
    members: list[Member] = field(default_factory=list)
    after: list[Any] = field(default_factory=list)
    more: Pairs = ()
    turn: int = 0
    views: list[Tensor] = field(default_factory=list)
    down: Any = None  # the event of the last copy

    @property
    def bytes(self) -> int:
        return sum(member.landed.bytes for member in self.members)

    @property
    def numbers(self) -> set[int]:
        return {member.number for member in self.members}


class Sending(NamedTuple):
    """A bucket on its way up. The gradients are nobody's business any more."""

    link: Link
    event: Any
    numbers: set[int]


class Flights:
    """What is on its way."""

    def __init__(self, link: Link, size: int, slots: int) -> None:
        self.slots = [torch.empty(0, dtype=torch.uint8)] * 2
        self.views: dict[tuple[int, int, Array], Tensor] = {}
        for turn in range(slots):
            self.room(link, turn, size)
        self.landing: Bucket | None = None
        self.sending: Sending | None = None
        self.last: dict[Link, Any] = {}  # the event of the last copy up

    def room(self, link: Link, turn: int, size: int) -> Tensor:
        """A slot of at least so many bytes. What still lies in a smaller one keeps it alive."""
        if self.slots[turn].numel() < size:
            self.slots[turn] = pin(link, size, "gradients to land in", "take a smaller offload_bucket=")
            self.views = {key: view for key, view in self.views.items() if key[0] != turn}
        return self.slots[turn]

    def view(self, link: Link, turn: int, begin: int, landed: Array) -> Tensor:
        """Where a gradient lands."""
        memory, key = self.room(link, turn, begin + landed.bytes), (turn, begin, landed)
        found = self.views.get(key)
        if found is None:
            found = self.views[key] = landed.at(memory, begin)
        return found

    def push(self, bucket: Bucket | None, land: Callable[[Bucket], Pairs], report: StepReport) -> None:
        """Have a bucket set out, and `land` the one that was under way: it is there, or the host waits for it.

        Arguments:
            bucket: None: nothing sets out.
            land: steps a bucket, and says what is to be sent up.
        """
        before, self.landing = self.landing, None
        if before is not None and before.link is not None:
            before.link.wait(before.down)
            report.host_syncs += 1
        if bucket is not None:
            self.set_out(bucket, 0 if before is None else 1 - before.turn)
            self.landing = bucket
        if before is not None:
            self.land(before, land)

    def set_out(self, bucket: Bucket, turn: int) -> None:
        link, bucket.turn = bucket.link, turn
        if link is None:
            bucket.views = [member.grad for member in bucket.members]
            return
        self.room(link, turn, bucket.bytes)
        begin = 0
        for member in bucket.members:
            bucket.views.append(self.view(link, turn, begin, member.landed))
            begin += member.landed.bytes
        grads = [(view, member.grad) for view, member in zip(bucket.views, bucket.members, strict=True)]
        bucket.down = link.down([*grads, *bucket.more], bucket.after)

    def land(self, bucket: Bucket, land: Callable[[Bucket], Pairs]) -> None:
        # Parameters are sent from where they are stepped. Those of the last step have gone: the gradients that landed
        # were queued behind them. Only one that arrives twice in a step may still be on its way.
        if self.sending is not None and not bucket.numbers.isdisjoint(self.sending.numbers):
            self.wait_for_sending()
        pairs = land(bucket)
        if bucket.link is not None:
            self.wait_for_sending()
            self.last[bucket.link] = bucket.link.up(pairs, bucket.after)
            self.sending = Sending(bucket.link, self.last[bucket.link], bucket.numbers)

    def wait_for_sending(self) -> None:
        sending, self.sending = self.sending, None
        if sending is not None:
            sending.link.wait(sending.event)

    def drain(self) -> None:
        """Nothing is on its way down any more, and the GPUs' current streams wait for what is on its way up."""
        bucket, self.landing = self.landing, None
        if bucket is not None and bucket.link is not None:
            bucket.link.wait(bucket.down)
        for link, event in self.last.items():
            link.hold(event)
        self.last.clear()
