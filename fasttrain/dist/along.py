"""The collectives of one dimension of a mesh: a wire's if there is one, else torch's on the group that the mesh has.

A `Wire` is a group of its own, made by all its members together, and on gloo faster; the mesh's own group is there
already, so what meets a DTensor in the middle of a forward pass can use it without keeping anything.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fasttrain.dist.wire import Wire, _all_gather, _reduce_scatter


class Along:
    """The ranks along a dimension of a mesh, and what they do together; all of them call the same in the same order.

    Arguments:
        dim: of the mesh.
        wire: over the same ranks. None: the mesh's own group.

    Attributes:
        rank, size: within the dimension.

    Raises:
        ValueError: the wire has other ranks.
    """

    def __init__(self, mesh: DeviceMesh, dim: int = 0, wire: Wire | None = None):
        self.rank, self.size = mesh.get_local_rank(dim), mesh.size(dim)
        self.group, self.wire = mesh.get_group(dim), wire
        if wire is not None and wire.ranks != (ranks := dist.get_process_group_ranks(self.group)):
            raise ValueError(f"the wire is over ranks {wire.ranks}, and dimension {dim} of the mesh over {ranks}: give "
                             "Wire.over(mesh[name]) of this dimension, or none")

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, of one shape and dtype: (ranks, *shape), the same on each."""
        if self.size == 1:
            return tensor[None]
        if self.wire is not None:
            return self.wire.all_gather_async(tensor).wait()
        found = tensor.new_empty(self.size * tensor.numel())
        _all_gather(found, tensor.reshape(-1), group=self.group)
        return found.view(self.size, *tensor.shape)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over the ranks, the same bits on each."""
        if self.size == 1 or tensor.numel() == 0:
            return tensor
        if self.wire is not None:
            return self.wire.sum_(tensor)
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def sum_of_own(self, tensor: Tensor) -> Tensor:
        """The sum over ranks of this rank's part, of shape (*shape), of tensors (ranks, *shape)."""
        flat = tensor.reshape(-1)
        if self.size == 1:
            return tensor[0]
        own: Any = tensor.new_empty(tensor[0].numel())
        if self.wire is not None:
            self.wire.reduce_scatter(own, flat).wait()
        else:
            _reduce_scatter(own, flat, group=self.group)
        return own.view(tensor.shape[1:])
