"""What a rank steps under ZeRO: its pieces of the parameters, as parameters of an inner optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasttrain.kernels.item import order
from fasttrain.kernels.pack import view_of
from fasttrain.optim import SOAP, Muon, Optimizer
from fasttrain.optim.part import Part, declare
from fasttrain.parallel.buckets import Bucket
from fasttrain.parallel.zero_buckets import Memory
from fasttrain.parallel.zero_cut import Cut, owned
from fasttrain.precision.codecs import STOCHASTIC, codec
from fasttrain.precision.storage import is_plain

Place = tuple[int, int]  # of a parameter: its group, and its index there


class Piece(NamedTuple):
    """An interval of a parameter that this rank steps.

    Attributes:
        where: the parameter's place.
        name, whole: the parameter.
        param: what is stepped: a view of the memory of parameters, flat, or of the parameter's shape if `entire`.
        first, numel: the interval, in the order of a slot (`fasttrain.dist.slots.Piece`).
        bucket, at: where its gradient lies: of which bucket, how far behind the cut.
        entire: parameters are not divided.
    """

    where: Place
    name: str
    whole: Tensor
    param: nn.Parameter
    first: int
    numel: int
    bucket: int
    at: int
    entire: bool

    @property
    def called(self) -> str:
        """How errors call it."""
        divided = not self.entire and self.numel != self.whole.numel()
        return f"{self.name}[{self.first}:{self.first + self.numel}]" if divided else self.name

    def grad_in(self, shard: Tensor) -> Tensor:
        """Its gradient in this rank's part of its bucket."""
        if self.entire:
            return view_of(shard, self.whole.detach(), self.at)
        return shard[self.at : self.at + self.numel]


def divisible(pattern: Any, params: Sequence[Sequence[Tensor]]) -> bool:
    """Whether an optimizer steps every element by itself, so that parameters can be cut anywhere.

    Arguments:
        pattern: the optimizer of the whole, or None if it is not one of this package.
        params: of each group.
    """
    if not isinstance(pattern, Optimizer):
        return False
    for index, group in enumerate(pattern.param_groups):
        if not pattern.takes_storage(group) or group.get("clip_each") is not None:
            return False
        for place, p in enumerate(params[index]):
            if not row_major(p) and any(codec(number).block or number & STOCHASTIC
                                        for number in codecs_of(pattern, (index, place))):
                return False
    return True


def row_major(p: Tensor) -> bool:
    """Whether a slot holds the parameter's elements in row-major order."""
    return p.is_contiguous() or order(p.detach()) is None


def codecs_of(pattern: Any, where: Place) -> tuple[int, ...]:
    """The codecs of a parameter and its states; none if all is kept as torch does."""
    group, p = pattern.param_groups[where[0]], pattern._param(where)
    if is_plain(group) or not pattern.takes_storage(group):
        return ()
    return pattern._layout(pattern._name(where), p, p.dtype, group, pattern.rule_of(group)).codecs


def costs(pattern: Any, params: Sequence[Sequence[Tensor]], names: dict[Tensor, str]) -> dict[str, float]:
    """What stepping each parameter costs: its elements; times their least dimension where matrices are multiplied."""
    found: dict[str, float] = {}
    for index, group in enumerate(params):
        matrices = isinstance(pattern, (Muon, SOAP)) and not pattern.takes_storage(pattern.param_groups[index])
        for p in group:
            if p in names:
                rank = min(p.shape[0], p.numel() // max(p.shape[0], 1)) if matrices and p.dim() > 1 else 1
                found[names[p]] = float(max(p.numel() * rank, 1))
    return found


def pieces(rank: int, buckets: Sequence[Bucket], cuts: Sequence[Cut], memories: Sequence[Sequence[Memory]],
           where: dict[Tensor, Place], names: dict[Tensor, str], pattern: Any, entire: bool) -> list[Piece]:
    """The pieces of this rank, in the order of the groups."""
    found = []
    for index, (bucket, cut) in enumerate(zip(buckets, cuts, strict=True)):
        for one in owned(bucket.plan, cut, rank):
            p = bucket.params[one.place]
            memory = next(memory for memory in memories[index] if one.place in memory.starts)
            start = memory.starts[one.place]
            view = view_of(memory.flat, p.detach(), start) if entire else \
                memory.flat[start + one.first : start + one.first + one.numel]
            param = nn.Parameter(view.data)  # `data`: with a count of versions of its own
            if isinstance(pattern, Optimizer):
                declare(param, Part(pattern._identity(where[p]), one.first, p.numel()))
            found.append(Piece(where[p], names[p], p, param, one.first, one.numel, index, one.at, entire))
    return sorted(found, key=lambda piece: piece.where)


def give(piece: Piece, grad: Tensor) -> None:
    """Let a piece have a gradient, whatever its dtype."""
    param = piece.param
    if grad.dtype != param.dtype and param.grad_dtype is not None:
        param.grad_dtype = None
    param.grad = grad


def patterns(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups, with parameters of the same kind that have no memory."""
    with torch.no_grad():
        made = []
        for group in groups:
            params: list[Any] = [nn.Parameter(torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device="meta"),
                                              requires_grad=p.requires_grad) for p in group["params"]]
            if "param_names" in group:
                params = list(zip(group["param_names"], params, strict=True))
            rest = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            made.append({**rest, "params": params})
    return made


def samples(groups: Sequence[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """The groups, each with one parameter without elements: what an optimizer's options are tried on."""
    return [{**{key: value for key, value in group.items() if key not in ("params", "param_names")},
             "params": [nn.Parameter(torch.empty(0, device=device))]} for group in groups]
