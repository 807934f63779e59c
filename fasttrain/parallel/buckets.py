"""The life of a gradient: none between steps, packed at its first arrival, then a view of its bucket."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fasttrain.dist import layout
from fasttrain.kernels.pack import Slots
from fasttrain.parallel import placed


class Bucket:
    """One bucket of gradients in memory, and how many are still to come in this backward pass.

    Arguments:
        plan: its place in the layout.
        params: whose gradients lie here, in the order of `plan.slots`.
        names: of these, for errors.

    Attributes:
        data: all elements, with the padding behind the last, which stays zero.
        staged: what is sent, if it travels in another dtype: gradients are then packed into it when they are complete.
        shown: what parameters have as gradients: the views of their slots, of DTensors one around it.
        kept: the same while they add up.
        waiting: gradients that have not arrived in this backward pass.
        rescaled: elements that were multiplied in place, beyond what `slots.moved` counts.
    """

    def __init__(self, plan: layout.Bucket, params: Sequence[Tensor], names: Sequence[str]):
        self.plan, self.params, self.names = plan, params, names
        self.data = torch.zeros(plan.elements, dtype=plan.dtype, device=params[0].device)
        self.slots = Slots(self.data, placed.parts(params), [slot.start for slot in plan.slots])
        self.shown = self.kept = placed.shown(params, self.slots.views)
        self._divided = self.shown is not self.slots.views
        self.staged: Tensor | None = None
        self._staging: Slots | None = None
        self.rescaled = 0
        ends = [slot.start + slot.numel for slot in plan.slots]
        begins = [*(slot.start for slot in plan.slots[1:]), plan.elements]
        self._gaps = [(end, begin) for end, begin in zip(ends, begins, strict=True) if end < begin]
        self.factor = 1.0  # what gradients are multiplied with as they are packed
        self.begin()

    def begin(self) -> None:
        """A backward pass begins."""
        self.arrived = bytearray(len(self.params))
        self.waiting = len(self.params)

    def stage(self, dtype: torch.dtype) -> None:
        """Let gradients travel in this dtype; if that is the bucket's, as they are."""
        self.staged = self._staging = None
        if dtype != self.data.dtype:
            self.staged = torch.zeros(len(self.data), dtype=dtype, device=self.data.device)
            self._staging = Slots(self.staged, self.slots.views, self.slots.offsets)

    def mend(self) -> None:
        """Zero the padding, after a step that was not finite: with 8-bit codes a whole block becomes NaN."""
        for begin, end in self._gaps:
            self.data[begin:end].zero_()

    def arrive(self, place: int, scale: float) -> None:
        """A gradient is complete for this backward pass.

        Raises:
            RuntimeError: it arrived before, or is one that none can be made of (create_graph, another shape or device).
        """
        if self.arrived[place]:
            raise RuntimeError(
                f"the gradient of {self.names[place]} arrived twice in one backward pass, the second time after it may "
                "have been sent: the parameter is used in several re-entrant checkpoints. Give static_graph=True if "
                "every step uses it as often, checkpoint with use_reentrant=False, or run backward under no_sync() and "
                "call finish()")
        self.take(place, scale, True)
        self.arrived[place] = 1
        self.waiting -= 1

    def absent(self, place: int) -> None:
        """There is no gradient in this step, and none will come: it counts as zero.

        Raises:
            RuntimeError: it was told of before.
        """
        if self.arrived[place]:
            raise RuntimeError(f"the gradient of {self.names[place]} was told to be complete twice in one step")
        (self._staging or self.slots).views[place].zero_()
        self.arrived[place] = 1
        self.waiting -= 1

    def take(self, place: int, scale: float, complete: bool) -> None:
        """Bring a gradient into its slot, multiplied by `scale`, and let `p.grad` be the slot.

        One that is complete goes to where it is sent from; its own slot gets the mean.
        """
        p, grad = self.params[place], self.params[place].grad
        slots = self._staging if complete and self._staging is not None else self.slots
        if grad is self.kept[place] and slots is self.slots:
            self.rescale(place, scale)
            return
        assert grad is not None
        if grad.requires_grad:
            raise RuntimeError(f"the gradient of {self.names[place]} has a graph of its own (create_graph=True), which "
                               "a bucket cannot keep: run this backward under no_sync() with the bare module, or take "
                               "torch.autograd.grad")
        try:
            if self._divided:
                grad, share = self.given(place)
                scale *= share
            slots.pack(place, grad, scale)
        except (TypeError, ValueError, RuntimeError) as error:
            raise type(error)(f"the gradient of {self.names[place]} does not fit into its bucket: {error}. If the "
                              "parameter was moved, cast or resized, wrap the model again") from error
        p.grad = self.kept[place]

    def given(self, place: int) -> tuple[Tensor, float]:
        """This rank's part of the gradient of a DTensor, and what to multiply it with."""
        return placed.arrived(self.params[place]), 1.0

    def rescale(self, place: int, factor: float) -> None:
        """Multiply what lies in a slot."""
        if factor != 1.0:
            view = self.slots.views[place]
            view.mul_(factor)
            self.rescaled += view.numel()

    def close(self, scale: float) -> None:
        """The backward pass is over: what has not arrived counts with what `p.grad` holds, or with zero."""
        for place, p in enumerate(self.params):
            if self.arrived[place]:
                continue
            if p.grad is None:
                (self._staging or self.slots).views[place].zero_()
            else:
                self.take(place, scale, True)
        self.waiting = 0

    def has(self, place: int) -> bool:
        """Whether this rank has a gradient of a parameter in this step."""
        return self.params[place].grad is not None

    def bind(self, place: int) -> None:
        """A parameter that has no gradient here gets the one that other ranks had."""
        self.params[place].grad = self.shown[place]

    def holds(self, place: int) -> bool:
        """Whether the gradient of a parameter lies here."""
        return self.params[place].grad is self.kept[place] or self.params[place].grad is self.shown[place]

    def reduced(self) -> None:
        """The means are there."""

    def release(self) -> None:
        """Let go of the parameters."""

    @property
    def touched(self) -> int:
        """Bytes read and written beside the collective, so far."""
        moved = [count for slots in (self.slots, self._staging) if slots is not None
                 for name, count in slots.moved.items() if name.startswith("bytes")]
        return sum(moved) + 2 * self.rescaled * self.data.element_size()
