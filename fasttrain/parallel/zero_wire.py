"""Reduce-scatter and all-gather of buckets that are cut evenly or unevenly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttrain.dist.wire import Wire
from fasttrain.kernels.chunks import sum_chunks
from fasttrain.parallel.zero_cut import Cut


def scatter(wire: Wire, out: Tensor, bucket: Tensor, cut: Cut, divisor: int) -> Any:
    """Write the mean over ranks of this rank's interval of a bucket into `out`.

    Messages between pairs of ranks, which our kernel adds in the order of ranks, in float32 (float64 for float64); only
    NCCL has an operation of its own for equal shards of one dtype.

    Arguments:
        out: flat, of the interval's length; it may be that interval.
        divisor: of the sum over ranks.

    Returns:
        A work, whose result is the sum of squares of `out` and whether something in it is not finite.
    """
    if _even(cut, len(bucket)) and wire.backend == "nccl" and out.dtype == bucket.dtype:
        mean = divisor == wire.size  # which NCCL makes by itself
        return wire.reduce_scatter(out, bucket, "avg" if mean else "sum", 1.0 if mean else 1.0 / divisor, squares=True)
    chunks = [bucket[begin:end] for begin, end in cut]
    mine = chunks[wire.rank]
    ticket = wire.issue("reduce_scatter", bucket.nbytes, bucket.nbytes - mine.nbytes)
    sends = [None if rank == wire.rank else chunk for rank, chunk in enumerate(chunks)]
    taken = {rank: wire.scratch.take(len(mine), mine.dtype) for rank in range(wire.size) if rank != wire.rank}
    handles = wire.post(ticket, sends, [taken.get(rank) for rank in range(wire.size)])

    def add() -> Any:
        if not len(mine):
            return torch.zeros((), dtype=torch.float64, device=out.device), torch.tensor(False, device=out.device)
        measured = sum_chunks([taken.get(rank, mine) for rank in range(wire.size)], out, 1.0 / divisor, True)
        wire.scratch.give(taken.values())
        return measured

    return wire.run(ticket, (handles, add))


def gather(wire: Wire, flat: Tensor, cut: Cut) -> Any:
    """Bring each rank's interval of `flat` to all, in place; a work."""
    begin, end = cut[wire.rank]
    mine = flat[begin:end]
    if _even(cut, len(flat)):
        return wire.all_gather_into(flat, mine)
    ticket = wire.issue("all_gather", flat.nbytes, mine.nbytes * (wire.size - 1))
    handles = wire.post(ticket, [None if rank == wire.rank else mine for rank in range(wire.size)],
                        [None if rank == wire.rank else flat[begin:end] for rank, (begin, end) in enumerate(cut)])
    return wire.run(ticket, (handles, lambda: None), line=1)


def _even(cut: Cut, elements: int) -> bool:
    share = elements // len(cut)
    return all(pair == (rank * share, (rank + 1) * share) for rank, pair in enumerate(cut)) and \
        share * len(cut) == elements
