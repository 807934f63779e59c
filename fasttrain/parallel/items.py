"""Means over items (tokens) that each rank counts: their number is known late, and divides in the step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttrain.parallel.passes import Passes
from fasttrain.precision.loss_scale import LossScaler, step_divided


class Items(Passes):
    """What `fasttrain.parallel.reducer.Reducer` does with items; see there."""

    def statistics(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def count(self, items: int) -> None:
        """Count items (tokens) whose losses were added up, not averaged, in this rank's backward passes of this step.

        Count before `backward()`: the number travels with the synchronised pass, and `step` divides by that of all
        ranks.
        """
        self._items += items

    def step(self, optimizer: Any, max_norm: float | None = None, scaler: LossScaler | None = None,
             unusable: Tensor | None = None) -> Tensor:
        """Step with the mean over all items that were counted on all ranks: `p.grad` is their sum over ranks / ranks.

        The factor enters the step's coefficients; no gradient is rewritten. Where something is not finite every rank
        skips the step.

        Arguments:
            optimizer: of this package.
            max_norm: clip the mean's norm to this.
            scaler: by which the losses were scaled, if they were; it is updated.
            unusable: bool of shape (), the same on every rank: something else is not finite (the loss).

        Returns:
            The norm of the mean gradient before clipping, float32 of shape ().

        Raises:
            TypeError: the optimizer is not of this package.
            RuntimeError: nothing was counted, or only after the backward pass that synchronised.
        """
        if not hasattr(optimizer, "step_scaled"):
            raise TypeError(f"{type(optimizer).__name__} cannot divide by a number of items that is known late: take "
                            "one of fasttrain.optim, or average the loss on each rank and do not count()")
        if self.idle:
            items, self._items = self._items, 0
        else:
            if self._items:
                raise RuntimeError(f"{self._items} items were counted after the backward pass that synchronised, which "
                                   "told the other ranks of those before it: call count() before backward()")
            self._read()  # also on a GPU, on a rank that counted nothing itself
            items, self._late_items = self._late_items, 0
        if not items:
            raise RuntimeError("no items were counted: call count() before each backward pass, or optimizer.step()")
        scale = torch.tensor(items / self.reach.terms, dtype=torch.float64, device=self.wire.device)
        squares, found = self.statistics()
        found = found if unusable is None else found | unusable
        return step_divided(scale, (squares, found), optimizer, max_norm, scaler)
