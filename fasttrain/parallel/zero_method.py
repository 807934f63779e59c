"""The way of buckets under ZeRO: each rank gets the mean of its own part, and no other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fasttrain.dist.layout import FlatLayout
from fasttrain.dist.wire import Wire
from fasttrain.kernels import norm
from fasttrain.parallel.buckets import Bucket
from fasttrain.parallel.over_axes import Reach
from fasttrain.parallel.wires import Method, Parts, Sent
from fasttrain.parallel.zero_buckets import Rotating
from fasttrain.parallel.zero_cut import Cut
from fasttrain.parallel.zero_groups import Division
from fasttrain.parallel.zero_shown import Shown
from fasttrain.parallel.zero_wire import scatter

if TYPE_CHECKING:
    from fasttrain.parallel.zero_arrival import ByBucket


class Scatter(Method):
    """True reduce-scatter of every bucket, and the life of the shards.

    Synchronised backward passes between two steps add up in the shards, in float32 from the second one on, because no
    parameter has a gradient meanwhile.

    Arguments:
        cuts: of each bucket.
        reach: the groups.
        divided: over which ranks their states are, by group.
        travels: the dtype in which gradients travel to be added; None: the bucket's.
        rotating: buckets are `Rotating`, and shards have memory of their own; else they lie in the buckets.

    Attributes:
        own: of each bucket, the mean of this rank's part in the last synchronised backward pass.
        used: for each parameter, whether any rank has had a gradient of it since the last step.
        holding: whether there was a synchronised backward pass since the last step.
        arriving: what steps buckets as they land, if anything does.
    """

    name = "shards"
    final = True

    def __init__(self, cuts: Sequence[Cut], reach: Reach, divided: Mapping[str, Division], travels: torch.dtype | None,
                 rotating: bool):
        super().__init__()
        self.reach, self.divided = reach, divided
        self.cuts, self.travels, self.rotating = list(cuts), travels, rotating
        self.own: list[Tensor] = []
        self._back: dict[torch.dtype, float] = {}  # bytes of a parameter, by the dtype of its bucket
        self._sums: list[Tensor] | None = None
        self.arriving: ByBucket | None = None
        self._flying: list[Landing] = []
        self.holding, self.used = False, list[bool]()

    def prepare(self, wire: Wire, layout: FlatLayout) -> None:
        super().prepare(wire, layout)
        self.divisor = self.reach.terms
        self._users: dict[int, Landing] = {}

    def lay(self, buckets: Sequence[Bucket], params: Sequence[Tensor], names: Sequence[str]) -> None:
        """Learn where the buckets of these parameters lie; once."""
        for bucket, cut in zip(buckets, self.cuts, strict=True):
            begin, end = cut[self.divided[bucket.plan.group].wire.rank]
            mine = bucket.data[begin:end]
            self.own.append(torch.zeros_like(mine) if self.rotating else mine)
            self._back[bucket.plan.dtype] = max(float(p.dtype.itemsize) for p in bucket.params)
        self._shown = Shown(params, names)

    def shard(self, index: int) -> Tensor:
        """This rank's part of a bucket: the mean of the gradients since the last step, added up."""
        return self.own[index] if self._sums is None else self._sums[index]

    def staging(self, dtype: torch.dtype) -> torch.dtype:
        return dtype if self.travels is None or self.rotating else self.travels

    def widths(self, dtype: torch.dtype) -> tuple[float, float]:
        return float((self.travels or dtype).itemsize), self._back[dtype]

    def of(self, group: str) -> Method:
        return OfGroup(self, self.reach.wires[group])

    # --- What the reducer calls ---------------------------------------------------------------------------------------

    def send(self, index: int, bucket: Bucket) -> Sent:
        self.issued(index, len(bucket.data) if self.reach.alike else 0)
        if isinstance(bucket, Rotating):
            memory = bucket.data.data_ptr()
            if (before := self._users.pop(memory, None)) is not None:
                before.wait()
            bucket.fill()
        data = bucket.data if bucket.staged is None else bucket.staged
        if self.travels is not None:
            data = data.to(self.travels)
        landing = Landing(self, index, scatter(
            self.reach.wires[bucket.plan.group], self.own[index], data,
            self.divided[bucket.plan.group].among_all(self.cuts[index]), self.divisor))
        if isinstance(bucket, Rotating):
            self._users[memory] = landing
        if self.arriving is not None:
            self._flying.append(landing)
        return landing

    def look(self) -> None:
        while self._flying and self._flying[0].done():
            self._flying.pop(0).wait()

    def begin(self) -> None:
        self._shown.clear()
        if self.holding and self.arriving is not None:
            raise RuntimeError("each synchronised backward pass is a step where buckets are stepped on arrival: call "
                               "step() before the next, and accumulate under no_sync()")
        if self.holding and self._sums is None:
            self._sums = [own.to(_sum_dtype(own), copy=True) for own in self.own]

    def ended(self, used: Sequence[bool]) -> None:
        self.used = [one or before for one, before in zip(used, self.used or [False] * len(used), strict=True)]
        self.holding = True
        self._users.clear()
        self._flying.clear()
        self._shown.show(self.used)

    # --- The life of the shards ---------------------------------------------------------------------------------------

    def drop(self) -> None:
        """Forget the gradients: they were stepped, or are not wanted."""
        self.holding, self.used, self._sums = False, [], None
        self._shown.clear()

    def landed(self, index: int, parts: Parts) -> Parts:
        """Add what has come to what was there; the sum of squares and the flag of all of it."""
        if self.arriving is not None:
            self.arriving.landed(index)
        if self._sums is not None:
            squares, found = norm.squares([self._sums[index].add_(self.own[index])])
            parts = squares[0], found | parts[1]
        counts = self.divided[self.layout.buckets[index].group].counts
        return parts if counts else (torch.zeros_like(parts[0]), parts[1])


class OfGroup(Method):
    """What the buckets of one group are asked for."""

    def __init__(self, scatter: Scatter, wire: Wire):
        super().__init__()
        self.scatter, self.wire = scatter, wire

    def staging(self, dtype: torch.dtype) -> torch.dtype:
        return self.scatter.staging(dtype)

    def widths(self, dtype: torch.dtype) -> tuple[float, float]:
        return self.scatter.widths(dtype)


class Landing(Sent):
    """A bucket whose part is on its way; it may be waited for more than once."""

    def __init__(self, method: Scatter, index: int, work: Any):
        super().__init__(work)
        self.method, self.index = method, index
        self.parts: Parts | None = None

    def wait(self) -> Parts:
        if self.parts is None:
            self.parts = self.method.landed(self.index, self.work.wait())
        return self.parts


def _sum_dtype(own: Tensor) -> torch.dtype:
    """In which gradients are added up: float32 at least, where a parameter can have a gradient of another dtype."""
    return torch.promote_types(own.dtype, torch.float32) if hasattr(own, "grad_dtype") else own.dtype
