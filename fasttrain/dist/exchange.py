"""Reductions made of messages between pairs of ranks, for gloo, and our own sums of what they bring.

A bucket is cut into as many equal chunks as there are ranks. Every rank sends each other rank its chunk and adds up what
it gets for its own, in the order of ranks (`fasttrain.kernels.chunks`): the result depends neither on when a message
arrived nor on how the elements are divided into buckets, and is the same bits in every run. Sums are made in
float32 (float64 for float64) whatever travels. A full all-reduce then sends each finished chunk to all.

Every rank sends (ranks - 1) / ranks of what travels in either half: as much as a ring does. gloo's own
reduce-scatter reduces everything everywhere, and its gather copies everything once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fasttrain.dist.scratch import Scratch
from fasttrain.dist.stages import Next, Stage, Ticket
from fasttrain.dist.work import Work
from fasttrain.kernels.chunks import BLOCK, encode_int8, sum_chunks, sum_int8


class Links(Protocol):
    """What of a wire is used here."""

    rank: int
    size: int
    scratch: Scratch

    def issue(self, kind: str, nbytes: int, sent: int) -> Ticket:
        """Count a collective on so many bytes, of which this rank will send so many."""

    def post(self, ticket: Ticket, sends: Sequence[Tensor | None], into: Sequence[Tensor | None],
             half: int = 1) -> list[Any]:
        """Send each rank its tensor and let that of each rank arrive; None for those that send or get nothing."""

    def run(self, ticket: Ticket, stage: Stage, line: int = 0) -> Work:
        """A work that goes through the stages."""


def reduce_scatter(links: Links, out: Tensor, bucket: Tensor, scale: float = 1.0, squares: bool = False) -> Work:
    """Write this rank's chunk of the sum over ranks of `bucket`, times `scale`, into `out`.

    Arguments:
        out: flat, any floating-point dtype; it may be this rank's chunk of `bucket`.
        bucket: flat, of `size` times its elements; unchanged but for that, and not to be written before the end.
        squares: measure what is stored in `out`; the work's result is then that of `sum_chunks`, else None.
    """
    ticket = links.issue("reduce_scatter", bucket.nbytes, bucket.nbytes * (links.size - 1) // links.size)
    return links.run(ticket, _scattered(links, ticket, out, bucket, scale, squares))


def ordered_all_reduce(links: Links, bucket: Tensor, scale: float = 1.0, squares: bool = False,
                       wire: torch.dtype | None = None, back: torch.dtype | None = None,
                       ready: Tensor | None = None) -> Work:
    """Replace a bucket by its sum over the ranks, times `scale`, the same bits on each.

    Arguments:
        bucket: flat; its length is a multiple of the number of ranks.
        squares: measure what of the result this rank has added up: its chunk (rounded as it travels back). The
            squares of all ranks make up those of the bucket.
        wire: the dtype in which numbers travel to be added; None: the bucket's own.
        back: the dtype in which the sums travel back; None: that of `wire`. Every rank rounds to it, the one that made
            a sum too.
        ready: what this rank adds, in the dtype in which it travels: what the bucket holds does not count then.
    """
    check_cut(bucket, links.size)
    wire = wire or (bucket if ready is None else ready).dtype
    back = back or wire
    mine = chunks_of(bucket, links.size)[links.rank]
    taken = []
    travels, shard = bucket if ready is None else ready, mine
    if wire != travels.dtype:
        taken.append(travels := links.scratch.take(len(bucket), wire).copy_(bucket))
    if back != bucket.dtype:
        taken.append(shard := links.scratch.take(len(mine), back))
    ticket = links.issue("all_reduce", bucket.nbytes, (travels.nbytes // links.size + shard.nbytes) * (links.size - 1))
    handles, add = _scattered(links, ticket, shard, travels, scale, squares)
    return links.run(ticket, (handles, lambda: _gathered(links, ticket, bucket, shard, add(), taken)))


def hierarchical_all_reduce(inside: Links, across: Links, bucket: Tensor, scales: tuple[float, float] = (1.0, 1.0),
                            squares: bool = False) -> Work:
    """Replace a bucket by its sum over the ranks of a grid, the same bits on each.

    Every rank adds its shard over its row (`inside`), the ranks of a column (`across`) all-reduce that, and the row
    gathers it: 2 (S - 1) / S of the bucket travel in a row of S, 2 (R - 1) / R of an S-th in a column of R. Sums are
    made in the order of ranks in the row, then of rows, whatever the buckets.

    Arguments:
        bucket: flat; its length is a multiple of the number of ranks of the grid.
        scales: factors of the sums inside and across.
        squares: measure what this rank has added up last, an equal part of the bucket, as `ordered_all_reduce`.
    """
    check_cut(bucket, inside.size * across.size)
    shard = chunks_of(bucket, inside.size)[inside.rank]
    piece = chunks_of(shard, across.size)[across.rank]
    ticket = inside.issue("all_reduce", bucket.nbytes, 2 * (inside.size - 1) * shard.nbytes)
    second = across.issue("all_reduce", shard.nbytes, 2 * (across.size - 1) * piece.nbytes)

    def added() -> Next:
        add()
        handles, add_across = _scattered(across, second, piece, shard, scales[1], squares)
        return Next((handles, lambda: gathered(add_across())))

    def gathered(measured: object) -> Next:
        handles, arrived = _gathered(across, second, shard, piece, None, []).stage

        def then() -> Next:
            arrived()
            return _gathered(inside, ticket, bucket, shard, measured, [])

        return Next((handles, then))

    handles, add = _scattered(inside, ticket, shard, bucket, scales[0], False)
    return inside.run(ticket, (handles, added))


def int8_all_reduce(links: Links, bucket: Tensor, scale: float = 1.0, squares: bool = False,
                    residual: Tensor | None = None, back: torch.dtype | None = None) -> Work:
    """`ordered_all_reduce` with 8-bit codes on the way to the sum: `fasttrain.kernels.chunks.encode_int8`.

    Arguments:
        bucket: as there, and not float64; chunks are whole blocks of 256 elements.
        residual: flat, of the bucket's size: what codes lack, added to the next ones (error feedback). This rank's
            own chunk is coded like the others, so that every rank counts alike.
        back: the dtype in which the sums travel back; None: bfloat16.

    Raises:
        ValueError: the bucket does not cut into whole blocks.
    """
    check_cut(bucket, links.size, BLOCK)
    size, rank = links.size, links.rank
    chunk = len(bucket) // size
    units = -(-chunk // BLOCK)
    taken = [links.scratch.take(size * (chunk + 4 * units), torch.uint8) for _ in "ab"]
    sent, arrived = (memory.view(size, -1) for memory in taken)
    for peer, part in enumerate(chunks_of(bucket, size)):
        left = None if residual is None else chunks_of(residual, size)[peer]
        encode_int8(part, *_codes(sent[peer], chunk), residual=left)
    taken.append(shard := links.scratch.take(chunk, back or torch.bfloat16))
    ticket = links.issue("all_reduce", bucket.nbytes, (sent[rank].nbytes + shard.nbytes) * (size - 1))
    handles = links.post(ticket, _all_but(rank, sent), _all_but(rank, arrived))

    def then() -> Next:
        pairs = [_codes(sent[rank] if peer == rank else arrived[peer], chunk) for peer in range(size)]
        measured = sum_int8([codes for codes, _ in pairs], [unit for _, unit in pairs], shard, scale, squares)
        return _gathered(links, ticket, bucket, shard, measured, taken)

    return links.run(ticket, (handles, then))


def all_gather(links: Links, out: Tensor, shard: Tensor) -> Work:
    """Write the shards of all ranks, in their order, into `out`, of the same dtype. `shard` may be a part of it."""
    ticket = links.issue("all_gather", out.nbytes, shard.nbytes * (links.size - 1))
    return links.run(ticket, _gathered(links, ticket, out, shard, None, []).stage, line=1)


def all_to_all(links: Links, into: Sequence[Tensor], sends: Sequence[Tensor]) -> Work:
    """Give ``sends[r]`` to rank r, and write what rank r gives into ``into[r]``; sizes may differ from pair to pair."""
    rank = links.rank
    ticket = links.issue("all_to_all", 0, sum(t.nbytes for t in sends) - sends[rank].nbytes)  # sizes may differ
    handles = links.post(ticket, _all_but(rank, sends), _all_but(rank, into))
    into[rank].copy_(sends[rank])
    return links.run(ticket, (handles, lambda: None))


def everyones(links: Links, tensor: Tensor) -> Work:
    """A small tensor of each rank, of one shape and dtype: the work's result is all of them, stacked.

    Every rank sends its own to every other: one round, and bytes that nobody minds.
    """
    size, rank = links.size, links.rank
    found = tensor.new_empty(size, *tensor.shape)
    found[rank] = tensor
    ticket = links.issue("all_gather", tensor.nbytes, tensor.nbytes * (size - 1))
    handles = links.post(ticket, _all_but(rank, [tensor.contiguous()] * size), _all_but(rank, found))
    return links.run(ticket, (handles, lambda: found))


def chunks_of(flat: Tensor, ranks: int) -> list[Tensor]:
    """The equal parts of a flat tensor, one for each rank.

    Example:
        >>> import torch
        >>> [c.tolist() for c in chunks_of(torch.arange(4), 2)]
        [[0, 1], [2, 3]]
    """
    return list(flat.view(ranks, len(flat) // ranks).unbind())


def check_cut(bucket: Tensor, ranks: int, block: int = 1) -> None:
    """Raise ValueError if a bucket does not cut into equal chunks of whole blocks."""
    if bucket.dim() != 1 or not bucket.is_contiguous() or len(bucket) % (ranks * block):
        raise ValueError(f"a bucket of shape {tuple(bucket.shape)} cannot be cut into {ranks} equal chunks"
                         f"{f' of whole blocks of {block}' if block > 1 else ''}: give a flat, contiguous one whose "
                         f"length is a multiple of {ranks * block}, padded with zeros")


def _scattered(links: Links, ticket: Ticket, out: Tensor, bucket: Tensor, scale: float, squares: bool) -> Stage:
    """The chunks of all ranks to this one, which adds them."""
    check_cut(bucket, links.size)
    chunks = chunks_of(bucket, links.size)
    taken = {r: links.scratch.take(len(out), bucket.dtype) for r in range(links.size) if r != links.rank}
    handles = links.post(ticket, _all_but(links.rank, chunks), [taken.get(r) for r in range(links.size)])

    def then() -> object:
        measured = sum_chunks([taken.get(r, chunks[r]) for r in range(links.size)], out, scale, squares)
        links.scratch.give([*taken.values()])
        return measured

    return handles, then


def _gathered(links: Links, ticket: Ticket, out: Tensor, shard: Tensor, result: object, taken: list[Tensor]) -> Next:
    """This rank's shard to all, and theirs into `out`, by way of other memory if its dtype is another.

    In the end `taken` is given back, and `result` is that of the work.
    """
    places = chunks_of(out, links.size)
    landing = {r: place for r, place in enumerate(places) if r != links.rank}
    if shard.dtype != out.dtype:
        landing = {r: links.scratch.take(len(shard), shard.dtype) for r in landing}
        taken = [*taken, *landing.values()]
    handles = links.post(ticket, _all_but(links.rank, [shard] * links.size),
                         [landing.get(r) for r in range(links.size)], half=2)
    if places[links.rank].data_ptr() != shard.data_ptr():
        places[links.rank].copy_(shard)

    def then() -> object:
        for r, arrived in landing.items():
            if arrived is not places[r]:
                places[r].copy_(arrived)
        links.scratch.give(taken)
        return result

    return Next((handles, then))


def _all_but(rank: int, tensors: Sequence[Tensor] | Tensor) -> list[Tensor | None]:
    return [None if other == rank else tensor for other, tensor in enumerate(tensors)]


def _codes(line: Tensor, elements: int) -> tuple[Tensor, Tensor]:
    """Codes and units that travel as one message."""
    return line[:elements].view(torch.int8), line[elements:].view(torch.float32)
