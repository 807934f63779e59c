"""Weights in full precision out of the pieces of ZeRO, and back into them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fasttrain.dist.wire import as_bytes
from fasttrain.kernels.pack import view_of
from fasttrain.parallel.zero_cut import owned
from fasttrain.parallel.zero_pieces import Piece


def full_precision(zero: Any, to: int | None) -> list[Tensor]:
    """Every parameter with all digits that its master keeps, on one rank or on all. Buckets follow one another."""
    wire, method = zero.reducer.wire, zero.method
    if to is not None and not 0 <= to < wire.size:
        raise ValueError(f"to={to}: the mesh has ranks 0 to {wire.size - 1}; None for all")
    here = to is None or wire.rank == to
    kept = zero.inner.full_precision() if zero._pattern is not None else \
        [piece.param.detach().to(wide(piece.whole)) for piece in zero._pieces]
    mine = {(piece.name, piece.first): in_slot_order(value, piece)
            for piece, value in zip(zero._pieces, kept, strict=True)}
    nothing = torch.empty(0, dtype=torch.uint8, device=wire.device)
    found: dict[Tensor, Tensor] = {}
    for bucket, cut in zip(zero.reducer.buckets, method.cuts, strict=True):
        plan = bucket.plan
        of_ranks = [owned(plan, cut, rank) for rank in range(wire.size)]
        parts = [as_bytes(mine[plan.slots[one.place].name, one.first]) for one in of_ranks[wire.rank]]
        sent = torch.cat([nothing, *parts])
        came = [torch.empty(sum(one.numel * wide(bucket.params[one.place]).itemsize for one in theirs) if here else 0,
                            dtype=torch.uint8, device=wire.device) for theirs in of_ranks]
        wire.all_to_all(came, [sent if to in (None, rank) else nothing for rank in range(wire.size)]).wait()
        for theirs, data in zip(of_ranks, came, strict=True):
            start = 0
            for one in theirs if here else ():
                p = bucket.params[one.place]
                end = start + one.numel * wide(p).itemsize
                whole = found.setdefault(p, torch.empty(p.numel(), dtype=wide(p), device=p.device))
                as_bytes(whole[one.first : one.first + one.numel]).copy_(data[start:end])
                start = end
    if not here:
        return []
    return [view_of(found[p], p.detach(), 0) if p in found else p.detach().to(wide(p))
            for group in zero.param_groups for p in group["params"]]


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
            flat = torch.empty(value.numel(), dtype=value.dtype, device=piece.whole.device)
            view_of(flat, piece.whole.detach(), 0).copy_(value)
            value = flat[piece.first : piece.first + piece.numel]
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
    flat = torch.empty(value.numel(), dtype=value.dtype, device=value.device)
    view_of(flat, piece.whole.detach(), 0).copy_(value)
    return flat


def wide(p: Tensor) -> torch.dtype:
    """In which all digits are: float32, float64 of float64."""
    return torch.promote_types(p.dtype, torch.float32)
