"""What a rank steps under ZeRO: its pieces of the parameters, as parameters of an inner optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasttrain.kernels.item import order
from fasttrain.kernels.pack import view_of
from fasttrain.optim import SOAP, Muon, Optimizer
from fasttrain.optim.kept import BLOCKS
from fasttrain.optim.local import is_dtensor, local, shares
from fasttrain.optim.part import Part, declare, pass_on
from fasttrain.optim.placing import cuts_blocks, place
from fasttrain.parallel.buckets import Bucket
from fasttrain.parallel.placed import wrapped
from fasttrain.parallel.zero_buckets import Memory
from fasttrain.parallel.zero_cut import Cut, owned
from fasttrain.precision.codecs import STOCHASTIC, codec
from fasttrain.precision.storage import is_plain

Place = tuple[int, int]  # of a parameter: its group, and its index there


class Piece(NamedTuple):
    """An interval of a parameter, or of the part of it that this rank holds (DTensor), which this rank steps.

    Attributes:
        where: the parameter's place.
        name, whole: the parameter.
        param: what is stepped: a view of the memory of parameters, flat, or of the parameter's shape if `entire`.
        first, numel: the interval, in the order of a slot (`fasttrain.dist.slots.Piece`); of a DTensor, of the slot of
            its local part.
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
        divided = not self.entire and self.numel != self.held.numel()
        return f"{self.name}[{self.first}:{self.first + self.numel}]" if divided else self.name

    @property
    def held(self) -> Tensor:
        """What this rank holds of the parameter: all of it, or the local part."""
        return local(self.whole.detach())

    def grad_in(self, shard: Tensor) -> Tensor:
        """Its gradient in this rank's part of its bucket."""
        if self.entire:
            return view_of(shard, self.held, self.at)
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
        for number, p in enumerate(params[index]):
            if not row_major(p) and any(codec(one).block or one & STOCHASTIC
                                        for one in codecs_of(pattern, (index, number))):
                return False
    return True


def row_major(p: Tensor) -> bool:
    """Whether a slot holds the elements of a parameter, or of its part here, in row-major order."""
    held = local(p.detach())
    return held.is_contiguous() or order(held) is None


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
                p, name = local(p.detach()), names[p]
                rank = min(p.shape[0], p.numel() // max(p.shape[0], 1)) if matrices and p.dim() > 1 else 1
                found[name] = float(max(p.numel() * rank, 1))
    return found


def pieces(rank_of: Mapping[str, int], buckets: Sequence[Bucket], cuts: Sequence[Cut],
           memories: Sequence[Sequence[Memory]], where: dict[Tensor, Place], names: dict[Tensor, str], pattern: Any,
           entire: bool) -> list[Piece]:
    """The pieces of this rank, in the order of the groups.

    Arguments:
        rank_of: among the ranks of each group of buckets.
    """
    found = []
    for index, (bucket, cut) in enumerate(zip(buckets, cuts, strict=True)):
        for one in owned(bucket.plan, cut, rank_of[bucket.plan.group]):
            p = bucket.params[one.place]
            memory = next(memory for memory in memories[index] if one.place in memory.starts)
            start, parts = memory.starts[one.place], [(one.first, one.numel, Part(0, one.first, p.numel()))]
            if isinstance(pattern, Optimizer):
                parts = parts_of(p, names[p], one.first, one.numel, pattern._identity(where[p]),
                                 any(number & STOCHASTIC for number in codecs_of(pattern, where[p])))
            for first, numel, part in parts:
                view = view_of(memory.flat, local(p.detach()), start) if entire else \
                    memory.flat[start + first : start + first + numel]
                param = nn.Parameter(view.data)  # `data`: with a count of versions of its own
                if isinstance(pattern, Optimizer):
                    declare(param, part)
                found.append(Piece(where[p], names[p], p, param, first, numel, index, one.at + first - one.first,
                                   entire))
    return sorted(found, key=lambda piece: piece.where)


def parts_of(p: Any, name: str, first: int, numel: int, identity: int,
             stochastic: bool) -> list[tuple[int, int, Part]]:
    """An interval of what this rank holds of a parameter, as parts of the whole: first element, length, and the part.

    It is one, but where random draws need to know where in the whole each element lies, and the interval begins within
    a row of a tensor that is cut by columns: then the rest of that row is a part of its own.

    Raises:
        ValueError: draws need to know it, and there is no order in it.
    """
    elements = p.numel()
    if not shares(p):
        return [(first, numel, Part(identity, first, elements))]
    blocks = not cuts_blocks(p, BLOCKS)
    if not stochastic:
        return [(first, numel, Part(identity, first, elements, blocks=blocks))]
    begin, run, pitch = place(name, p)
    if run == 0:
        return [(first, numel, Part(identity, begin + first, elements, blocks=blocks))]
    row, at = divmod(first, run)
    head = min(run - at, numel) if at else 0
    found = [(first, head, Part(identity, begin + row * pitch + at, elements, blocks=blocks))] if head else []
    if numel > head or not found:
        found.append((first + head, numel - head, Part(identity, begin + (first + head) // run * pitch, elements, run,
                                                       pitch, blocks)))
    return found


def slot_of(value: Tensor, piece: Piece) -> Tensor:
    """What lies in the slot of a piece's parameter: values of the shape of what this rank holds, flat."""
    if row_major(piece.whole):
        return value.reshape(-1)
    flat = torch.empty(value.numel(), dtype=value.dtype, device=value.device)
    view_of(flat, piece.held, 0).copy_(value)
    return flat


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
            params: list[Any] = [nn.Parameter(without_memory(p), requires_grad=p.requires_grad)
                                 for p in group["params"]]
            for p, made_of in zip(params, group["params"], strict=True):
                pass_on(made_of, p)
            if "param_names" in group:
                params = list(zip(group["param_names"], params, strict=True))
            rest = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            made.append({**rest, "params": params})
    return made


def without_memory(p: Any) -> Tensor:
    """A tensor like a parameter, on the meta device; of a DTensor one that is cut alike."""
    held = local(p.detach())
    made = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device="meta")
    return wrapped(p, made, p.placements) if is_dtensor(p) else made


def samples(groups: Sequence[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """The groups, each with one parameter without elements: what an optimizer's options are tried on."""
    return [{**{key: value for key, value in group.items() if key not in ("params", "param_names")},
             "params": [nn.Parameter(torch.empty(0, device=device))]} for group in groups]
