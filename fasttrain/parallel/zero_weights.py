"""Weights in full precision out of the pieces of ZeRO, and back into them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fasttrain.dist.wire import as_bytes
from fasttrain.kernels.pack import view_of
from fasttrain.optim.local import gathered, local, part_of, shares
from fasttrain.parallel.zero_cut import owned
from fasttrain.parallel.zero_pieces import Piece, slot_of
from fasttrain.parallel.zero_state import Goal


def full_precision(zero: Any, to: int | None) -> list[Tensor]:
    """Every parameter with all digits that its master keeps, on one rank or on all. Buckets follow one another."""
    goal = Goal(zero.reducer, to)
    kept = zero.inner.full_precision() if zero._pattern is not None else \
        [piece.param.detach().to(wide(piece.whole)) for piece in zero._pieces]
    mine: dict[int, list[Tensor]] = {}
    for piece, value in sorted(zip(zero._pieces, kept, strict=True), key=lambda pair: pair[0].at):
        mine.setdefault(piece.bucket, []).append(as_bytes(in_slot_order(value, piece)))
    found: dict[Tensor, Tensor] = {}
    for index in range(len(zero.reducer.buckets)):
        for p, flat in _brought(zero, index, mine.get(index, []), goal).items():
            held = view_of(flat, local(p.detach()), 0)
            whole = gathered(held.contiguous(), p) if shares(p) else held
            if goal.here:
                found[p] = whole
    if not goal.here:
        return []
    return [found[p] if p in found else p.detach().to(wide(p)) for group in zero.param_groups for p in group["params"]]


def _brought(zero: Any, index: int, mine: Sequence[Tensor], goal: Goal) -> dict[Tensor, Tensor]:
    """What the ranks of a bucket's group hold of its parameters, flat, in the order of slots."""
    bucket, cut = zero.reducer.buckets[index], zero.method.cuts[index]
    wire = zero.method.divided[bucket.plan.group].wire
    here = goal.to is None or wire.rank == goal.to
    of_ranks = [owned(bucket.plan, cut, rank) for rank in range(wire.size)]
    nothing = torch.empty(0, dtype=torch.uint8, device=wire.device)
    sent = torch.cat([nothing, *mine])
    came = [torch.empty(sum(one.numel * wide(bucket.params[one.place]).itemsize for one in theirs) if here else 0,
                        dtype=torch.uint8, device=wire.device) for theirs in of_ranks]
    wire.all_to_all(came, [sent if goal.to in (None, rank) else nothing for rank in range(wire.size)]).wait()
    found: dict[Tensor, Tensor] = {}
    for theirs, data in zip(of_ranks, came, strict=True):
        start = 0
        for one in theirs if here else ():
            p = bucket.params[one.place]
            end = start + one.numel * wide(p).itemsize
            flat = found.setdefault(p, torch.empty(local(p).numel(), dtype=wide(p), device=p.device))
            as_bytes(flat[one.first : one.first + one.numel]).copy_(data[start:end])
            start = end
    return dict(sorted(found.items(), key=lambda pair: zero._names[pair[0]]))


def load_full_precision(zero: Any, weights: Sequence[Tensor]) -> None:
    """Cut whole weights into this rank's pieces, and bring the parameters to all."""
    params = [p for group in zero.param_groups for p in group["params"]]
    if len(weights) != len(params):
        raise ValueError(f"{len(weights)} weights are given for {len(params)} parameters")
    given = dict(zip(params, weights, strict=True))
    for p, value in given.items():
        if value.shape != p.shape:
            raise ValueError(f"{zero._names.get(p, 'a frozen parameter')}: the weight has shape {tuple(value.shape)}, "
                             f"the parameter {tuple(p.shape)}")
    cut = []
    for piece in zero._pieces:
        value = given[piece.whole]
        if not piece.entire:
            value = slot_of(part_of(value, piece.whole).to(piece.whole.device), piece)
            value = value[piece.first : piece.first + piece.numel]
        cut.append(value)
    with torch.no_grad():
        for p, value in given.items():
            if p not in zero._names:
                p.copy_(value)
        if zero._pattern is not None:
            zero.inner.load_full_precision(cut)
        else:
            for piece, value in zip(zero._pieces, cut, strict=True):
                piece.param.copy_(value)


def in_slot_order(value: Tensor, piece: Piece) -> Tensor:
    """The elements of a piece, flat, in the order of its slot."""
    if not piece.entire:
        return value.reshape(-1)
    return slot_of(value, piece)


def wide(p: Tensor) -> torch.dtype:
    """In which all digits are: float32, float64 of float64."""
    return torch.promote_types(p.dtype, torch.float32)
