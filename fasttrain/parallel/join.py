"""Ranks with different numbers of batches: those that have no more answer the others until all are done.

torch's own context (`torch.distributed.algorithms.Join`) asks in each iteration who still has data; what the others
must answer, bucket for bucket, is here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.distributed.algorithms.join import JoinHook

from fasttrain.dist.wire import Wire


class Present(NamedTuple):
    """Who takes part in an iteration.

    Attributes:
        ranks: those that still have data, in order.
        syncing: whether they synchronise in this backward pass.
    """

    ranks: list[int]
    syncing: bool


def ask(wire: Wire, joined: bool, syncing: bool) -> Present:
    """Who has data, and what they are about to do: one small all-reduce.

    Raises:
        RuntimeError: some of those with data synchronise and others do not; on every rank.
    """
    table = torch.zeros(wire.size, 2, dtype=torch.int64)
    if not joined:
        table[wire.rank] = torch.tensor([1, int(syncing)])
    table = wire.sum_(table.to(wire.device)).cpu()
    ranks = table[:, 0].nonzero().flatten().tolist()
    wanting = int(table[:, 1].sum())
    if 0 < wanting < len(ranks):
        some = table[:, 1].nonzero().flatten().tolist()
        raise RuntimeError(f"of ranks {ranks}, which have data left, only {some} run this forward pass "
                           "outside of no_sync(): do the same on all")
    return Present(ranks, wanting > 0)


class Shadow(JoinHook):
    """What a rank without data does while others train.

    Arguments:
        parallel: a `DataParallel`.
        divide_by_initial_world_size: divide by all ranks, not by those that have data.
    """

    def __init__(self, parallel: Any, divide_by_initial_world_size: bool):
        self.parallel, self.by_all = parallel, divide_by_initial_world_size
        parallel.divide_by_all, parallel.reducer.joining = divide_by_initial_world_size, True

    def main_hook(self) -> None:
        """One iteration of the others."""
        reducer = self.parallel.reducer
        present = ask(reducer.wire, True, False)
        self.parallel.before_forward(present)
        if present.syncing:
            reducer.shadow()

    def post_hook(self, is_last_joiner: bool) -> None:
        """All are done: the model of one of those that trained to the end goes to the others."""
        reducer = self.parallel.reducer
        last = ask(reducer.wire, not is_last_joiner, False).ranks[-1]
        self.parallel.broadcast([*self.parallel.module.parameters(), *self.parallel.module.buffers()], last)
        reducer.joining = False
        reducer.method.divisor = reducer.wire.size
