"""Parameters as DTensors over the tensor axis, and modules that run on the local parts of theirs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement

from fasttrain.optim.local import chunk, is_dtensor

ABSENT = object()


def agreed(tensor: Tensor, mesh: Any) -> Tensor:
    """The values that the first rank of the tensor axis has; of tensors on meta nothing is sent.

    DTensor's `distribute_tensor` would bring the random generators of all GPUs to one state, too.
    """
    values = tensor.detach().contiguous()
    if not values.is_meta:
        dist.broadcast(values, group=mesh.get_group(), group_src=0)
    return values


def indices(size: int, placement: Placement, count: int, number: int) -> Tensor:
    """Which of so many rows or columns lie on one of `count` ranks.

    Example:
        >>> from torch.distributed.tensor import Shard
        >>> [indices(5, Shard(0), 4, rank).tolist() for rank in range(4)]
        [[0, 1], [2, 3], [4], []]
    """
    pieces = getattr(placement, "split_factor", 1)  # of _StridedShard: a part of each of so many
    every = torch.arange(size)
    return torch.cat([chunk(chunk(every, pieces, piece), count, number) for piece in range(pieces)])


def distributed(p: nn.Parameter, mesh: Any, placement: Any) -> nn.Parameter:
    """The parameter with the first rank's values, placed; the shape is that of the whole, evenly divided or not."""
    whole = agreed(p, mesh)
    part = whole
    if not placement.is_replicate():
        dim = placement.dim
        mine = indices(whole.shape[dim], placement, mesh.size(), mesh.get_local_rank())
        part = whole.index_select(dim, mine.to(whole.device))
    placed = DTensor.from_local(part, mesh, [placement], run_check=False, shape=whole.shape,
                                stride=whole.contiguous().stride())
    return nn.Parameter(placed, requires_grad=p.requires_grad)


def local(p: Any, gradient: Placement) -> Tensor:
    """What this rank has of a parameter, in the autograd graph.

    Arguments:
        gradient: how the gradient of the local part is placed.
    """
    return p.to_local(grad_placements=[gradient]) if is_dtensor(p) else p


@contextlib.contextmanager
def shown(values: Sequence[tuple[nn.Module, str, Any]]) -> Iterator[None]:
    """Let modules have other attributes for a while, as local tensors in the place of DTensors.

    An attribute of the instance is found before a registered parameter is looked for: what is registered, and with it
    `state_dict` and `parameters`, stays as it is.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> with shown([(layer, "weight", torch.zeros(1, 2))]):
        ...     layer(torch.ones(2)).item()
        0.0
        >>> layer.weight is layer._parameters["weight"]
        True
    """
    before = [module.__dict__.get(name, ABSENT) for module, name, _ in values]
    try:
        for module, name, value in values:
            module.__dict__[name] = value
        yield
    finally:
        for (module, name, _), value in zip(values, before, strict=True):
            if value is ABSENT:
                del module.__dict__[name]
            else:
                module.__dict__[name] = value
