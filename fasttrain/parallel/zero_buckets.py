"""Flat memory of ZeRO: the parameters beside each bucket of gradients, and at stage 2 the few buckets that rotate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fasttrain.dist import layout
from fasttrain.dist.cutting import padded
from fasttrain.dist.wire import Wire
from fasttrain.kernels.pack import Slots, view_of
from fasttrain.optim.local import is_dtensor, local
from fasttrain.parallel import placed
from fasttrain.parallel.buckets import Bucket
from fasttrain.parallel.over_axes import Reach
from fasttrain.parallel.zero_cut import Cut, owned

UNIT = 256  # elements: starts are multiples of it


class Memory:
    """The parameters of one dtype of a bucket, in flat memory from which each rank's part goes to all.

    The parameters, and of DTensors the local parts, become views of it, with their strides.

    Arguments:
        bucket: of gradients, with `params` and `plan`.
        dtype: of the parameters that are meant.
        cut: of the bucket.
        wire: between the ranks of its group.

    Attributes:
        flat: all elements.
        starts: by place in the bucket, where each parameter begins.
        cut: of `flat`.
        params: that lie here.
    """

    def __init__(self, bucket: Bucket, dtype: torch.dtype, cut: Cut, wire: Wire):
        plan, self.wire = bucket.plan, wire
        places = [place for place, p in enumerate(bucket.params) if p.dtype == dtype]
        if len(places) == len(plan.slots):
            self.starts, elements, self.cut = {slot: plan.slots[slot].start for slot in places}, plan.elements, cut
        else:  # parameters of several dtypes, whose gradients have one: each dtype lies closer together
            self.starts, elements = {}, 0
            for place in places:
                self.starts[place] = elements
                elements += padded(plan.slots[place].numel, UNIT)
            self.cut = tuple(self._image(plan, cut, rank) for rank in range(len(cut)))
        self.flat = torch.zeros(elements, dtype=dtype, device=bucket.params[0].device)
        self.params = [bucket.params[place] for place in places]
        for place, p in zip(places, self.params, strict=True):
            held = local(p.detach())
            view = view_of(self.flat, held, self.starts[place]).copy_(held)
            if is_dtensor(p):
                p._local_tensor = view  # type: ignore[attr-defined]
            else:
                p.data = view
        self._pointers = [local(p).data_ptr() for p in self.params]

    def _image(self, plan: layout.Bucket, cut: Cut, rank: int) -> tuple[int, int]:
        mine = [one for one in owned(plan, cut, rank) if one.place in self.starts and one.numel]
        if not mine:
            return 0, 0
        return (self.starts[mine[0].place] + mine[0].first,
                self.starts[mine[-1].place] + mine[-1].first + mine[-1].numel)

    def moved(self) -> list[Tensor]:
        """Parameters that are no longer here."""
        return [p for p, pointer in zip(self.params, self._pointers, strict=True)
                if local(p).data_ptr() != pointer or p.dtype != self.flat.dtype]


class Rotating(Bucket):
    """A bucket without memory of its own: gradients stay where autograd puts them until all have come, then are packed.

    Arguments:
        plan, params, names: as of `Bucket`.
        memory: flat, at least as large as the bucket; other buckets use it before and after.
        adds: gradients are addends over the tensor axis.
    """

    def __init__(self, plan: layout.Bucket, params: Sequence[Tensor], names: Sequence[str], memory: Tensor,
                 adds: bool = False):
        self.plan, self.params, self.names = plan, params, names
        self.data = memory[: plan.elements]
        self.slots = Slots(self.data, placed.parts(params), [slot.start for slot in plan.slots])
        self.shown = self.kept = self.slots.views
        self.adds, self._divided = adds, any(map(is_dtensor, params))
        ends = [0, *(slot.start + slot.numel for slot in plan.slots)]
        starts = [*(slot.start for slot in plan.slots), plan.elements]
        self.staged = self._staging = None
        self.gaps = [self.data[end:start] for end, start in zip(ends, starts, strict=True) if end < start]
        self.rescaled = 0
        self.begin()

    def begin(self) -> None:
        super().begin()
        self.had = bytearray(len(self.params))

    def mend(self) -> None:
        """Nothing: `fill` zeroes the padding."""

    def take(self, place: int, scale: float, complete: bool) -> None:
        """The gradient stays where it is, in the bucket's dtype."""
        p = self.params[place]
        assert p.grad is not None
        if p.grad.requires_grad:
            raise RuntimeError(f"the gradient of {self.names[place]} has a graph of its own (create_graph=True), which "
                               "a bucket cannot keep: take torch.autograd.grad")
        if p.grad.dtype != self.data.dtype:
            p.grad = p.grad.to(self.data.dtype)

    def close(self, scale: float) -> None:
        self.waiting = 0

    def has(self, place: int) -> bool:
        return bool(self.had[place]) or self.params[place].grad is not None

    def bind(self, place: int) -> None:
        """Nothing: what is reduced lies in shards."""

    def given(self, place: int) -> tuple[Tensor, float]:
        return placed.arrived_addend(self.params[place]) if self.adds else super().given(place)

    def fill(self) -> None:
        """Pack all gradients, and let go of them; what is missing is zero."""
        if self.gaps:
            torch._foreach_zero_(self.gaps)
        for place, p in enumerate(self.params):
            if p.grad is None:
                self.slots.views[place].zero_()
        try:
            grads = [p.grad for p in self.params if p.grad is not None]
            if len(grads) == len(self.params) and not self._divided:
                self.slots.pack_all(grads)
            else:
                for place, p in enumerate(self.params):
                    if p.grad is not None:
                        self.slots.pack(place, *self.given(place))
        except (TypeError, ValueError, RuntimeError) as error:
            raise type(error)(f"a gradient of the bucket of {', '.join(self.names[:4])} does not fit into it: {error}. "
                              "If a parameter was moved, cast or resized, wrap the model again") from error
        for place, p in enumerate(self.params):
            self.had[place] |= p.grad is not None
            p.grad = None


def rotation(plans: Any, reach: Reach, count: int) -> Callable[..., Bucket]:
    """Makes buckets that take turns in a few memories of each dtype."""
    if count < 1:
        raise ValueError(f"rotating={count!r}: give the number of buckets in memory, at least 1")
    largest: Counter[torch.dtype] = Counter()
    for plan in plans:
        largest[plan.dtype] = max(largest[plan.dtype], plan.elements)
    memories: dict[tuple[torch.dtype, int], Tensor] = {}
    seen: Counter[torch.dtype] = Counter()

    def make(plan: Any, params: Any, names: Any) -> Bucket:
        turn = plan.dtype, seen[plan.dtype] % count
        seen[plan.dtype] += 1
        if turn not in memories:
            memories[turn] = torch.zeros(largest[plan.dtype], dtype=plan.dtype, device=reach.wire.device)
        return Rotating(plan, params, names, memories[turn], reach.groups[plan.group].adds)

    return make
