"""Several backward passes for one step: only the last of them communicates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Accumulation:
    """Counts micro-batches, and synchronises in the last of each group; make it with `DataParallel.accumulate`.

    Arguments:
        reducer: what is silent in all but the last.
        micro_batches: of one step.

    Attributes:
        ends: the last micro-batch synchronised: it is time to step.
        taken: micro-batches of the group so far.

    Example:
        accumulate = model.accumulate(4)
        for number, batch in enumerate(batches):
            with accumulate(final=number + 1 == len(batches)):     # the last group may be smaller
                loss = loss_of(model, batch, reduction="sum")
                model.count(batch.tokens)
                loss.backward()
            if accumulate.ends:
                model.step(optimizer, max_norm=1.0)                # the mean over all tokens of all ranks
                optimizer.zero_grad()
    """

    def __init__(self, reducer: Any, micro_batches: int):
        if micro_batches < 1:
            raise ValueError(f"accumulate({micro_batches}): a step has at least one micro-batch")
        self.reducer, self.micro_batches = reducer, micro_batches
        self.taken, self.ends = 0, False

    @contextmanager
    def __call__(self, final: bool = False) -> Iterator[None]:
        """One micro-batch, forward and backward; `final`: it is the last although the group is not full."""
        self.taken = 1 if self.ends else self.taken + 1
        self.ends = final or self.taken == self.micro_batches
        if self.ends:
            yield
        else:
            with self.reducer.no_sync():
                yield
