"""The collectives of `fully_shard` by our exchange between pairs of ranks, on gloo.

gloo's reduce-scatter is an all-reduce of the whole gradient, of which a rank then keeps its part: twice the bytes. Its
all-gather is no worse than ours; but who waits for ours hears of a rank that has failed, and its bytes are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fasttrain.dist.wire import Wire, ranks_of

OPERATIONS = {dist.ReduceOp.SUM: "sum", dist.ReduceOp.AVG: "avg"}


class Collective:
    """What torch's `AllGather` and `ReduceScatter` have in common.

    Arguments:
        wire: of the ranks over which parameters are sharded.
    """

    def __init__(self, wire: Wire):
        self.wire = wire
        self._known: Any = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for a collective."""
        return torch.empty(*size, dtype=dtype, device=device)

    def check(self, group: dist.ProcessGroup) -> None:
        """Raise ValueError for a group of other ranks."""
        if group is not self._known:
            if ranks_of(group) != self.wire.ranks:
                raise ValueError(f"parameters are sharded over ranks {ranks_of(group)}, and their gradients would be "
                                 f"exchanged between {self.wire.ranks}: shard a model over one mesh")
            self._known = group


class Scattered(Collective):
    """What `FSDPModule.set_custom_reduce_scatter` takes: the methods of torch's `ReduceScatter`.

    Gradients of any floating-point dtype are added in float32 (float64), in the order of ranks.
    """

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any,
                 async_op: bool = False) -> None:
        """Write this rank's part of the sum, or mean, of `input_tensor` over the ranks; it is there on return.

        Raises:
            ValueError: another operation, or a group of other ranks.
        """
        self.check(group)
        kind = next((name for known, name in OPERATIONS.items() if op == known), None)
        if kind is None:
            raise ValueError(f"gradients are added or averaged, not {op}: leave set_gradient_divide_factor alone, and "
                             "scale the loss")
        self.wire.reduce_scatter(output_tensor, input_tensor, kind).wait()


class Gathered(Collective):
    """What `FSDPModule.set_custom_all_gather` takes: the methods of torch's `AllGather`."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup,
                 async_op: bool = False) -> None:
        """Write the parts of all ranks into `output_tensor`, in their order; they are there on return.

        Raises:
            ValueError: a group of other ranks.
        """
        self.check(group)
        self.wire.all_gather_into(output_tensor, input_tensor).wait()
