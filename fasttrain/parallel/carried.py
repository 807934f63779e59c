"""Buckets of groups that have more ranks, or fewer, than a gradient is the mean of.

Where a bucket still holds the mean of an earlier synchronised backward pass and gradients of another add to it, that
mean comes from every rank of the group again. It is multiplied with what makes the sum right (1/2 where a group has
twice the ranks) before the first gradient is added, which a hook sees coming. Gradients that are addends over the
tensor axis are kept as such while they add up, and are shown whole when they are reduced.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from fasttrain.dist import layout
from fasttrain.parallel import placed
from fasttrain.parallel.buckets import Bucket
from fasttrain.parallel.over_axes import Reach


class Carried(Bucket):
    """A bucket whose means do not add up as they are.

    Arguments:
        plan, params, names: as of `Bucket`.
        carry: what a mean is multiplied with where gradients add to it.
        adds: gradients are addends over the tensor axis.
    """

    def __init__(self, plan: layout.Bucket, params: Sequence[Tensor], names: Sequence[str], carry: float, adds: bool):
        super().__init__(plan, params, names)
        self.carry, self.adds = carry, adds
        if adds:
            self.kept = placed.addends(params, self.slots.views)
        self._means = bytearray(len(params))  # slots that hold a mean to which nothing was added
        me = weakref.ref(self)
        self._hooks = [p.register_hook(partial(_coming, me, place)) for place, p in enumerate(params)]

    def open(self, place: int) -> None:
        """Let gradients add up in a slot, whatever it holds."""
        if self._means[place] and self.params[place].grad is self.shown[place]:
            self.rescale(place, self.carry)
            self.params[place].grad = self.kept[place]
        self._means[place] = 0

    def take(self, place: int, scale: float, complete: bool) -> None:
        self.open(place)
        super().take(place, scale, complete)

    def given(self, place: int) -> tuple[Tensor, float]:
        return placed.arrived_addend(self.params[place]) if self.adds else super().given(place)

    def reduced(self) -> None:
        for place, p in enumerate(self.params):
            if p.grad is not None:
                p.grad = self.shown[place]
                self._means[place] = 1

    def release(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _coming(bucket: weakref.ref[Carried], place: int, grad: Tensor) -> None:
    if (self := bucket()) is not None:
        self.open(place)


def bucket_of(reach: Reach, plan: layout.Bucket, params: Sequence[Tensor], names: Sequence[str]) -> Bucket:
    """The bucket of a group."""
    carry, adds = reach.carry(plan.group), reach.groups[plan.group].adds
    return Bucket(plan, params, names) if carry == 1 and not adds else Carried(plan, params, names, carry, adds)
