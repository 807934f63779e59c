"""ZeRO that steps a bucket as its reduced gradients land, within backward, where no clip needs all of them first."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from fasttrain.optim.report import StepReport
from fasttrain.parallel.zero_pieces import Piece

WHY = ("gradients are stepped as their buckets land (step_on_arrival), before {} is known: remove() that, or do "
       "without; clip_value= and clip_each= clip without it")


class ByBucket:
    """Steps this rank's pieces of each bucket when its reduction is over; `remove` ends it. See `Zero.step_on_arrival`.

    A piece is stepped if this rank had a gradient of its parameter. Whether others had one is known only when backward
    ends: `step` steps those.
    """

    def __init__(self, zero: Any):
        self._zero = weakref.ref(zero)
        self._pieces: list[list[tuple[Piece, int]]] = [[] for _ in zero.reducer.buckets]
        place = dict(zip(zero.reducer.params, zero.reducer._where, strict=True))
        for piece in zero._pieces:
            self._pieces[piece.bucket].append((piece, place[piece.whole][1]))
        self.stepped: set[int] = set()  # pieces since the last `step`, by id
        zero.method.arriving = self

    @torch.no_grad()
    def landed(self, index: int) -> None:
        """This rank's part of a bucket is there."""
        zero = self._zero()
        if zero is None:
            return
        bucket = zero.reducer.buckets[index]
        mine = [piece for piece, place in self._pieces[index] if bucket.has(place)]
        if not mine:
            return
        if not self.stepped:
            zero.before_pieces()
        for piece in mine:
            zero.give(piece)
        zero.inner._pass(1.0, StepReport())
        for piece in mine:
            piece.param.grad = None
        self.stepped.update(map(id, mine))
        zero.inner._arrived.update(id(piece.param) for piece in mine)
        zero.wrote({piece.whole for piece in mine})

    def remove(self) -> None:
        """Go back to stepping all pieces in `step`.

        Raises:
            RuntimeError: some have been stepped, and `step` was not called yet.
        """
        if self.stepped:
            raise RuntimeError("some buckets of this step have been stepped as they landed: call step() first")
        zero = self._zero()
        if zero is not None and zero.arriving is self:
            zero.arriving = zero.method.arriving = None


def refuse(zero: Any, what: str) -> None:
    """Raise RuntimeError if something needs all gradients before the first is stepped."""
    if zero.arriving is not None:
        raise RuntimeError(WHY.format(what))
