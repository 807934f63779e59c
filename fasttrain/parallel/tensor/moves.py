"""How activations pass from one placement over the tensor axis to another, as plain tensors on both sides.

What is sent, and back in the backward pass, of an activation of n elements over t ranks (each rank sends (t - 1) / t of
n for a gather or a scattered sum, twice that for a sum):

=================================  ==========================  =============================
move                               forward                     backward
=================================  ==========================  =============================
COPY, before columns               nothing                     sum
GATHER, before columns             gather                      scattered sum
SUM, after rows                    sum                         nothing
SCATTERED SUM, after rows          scattered sum               gather
CUT, where sequences are divided   nothing                     gather
JOIN, where they are whole again   gather                      nothing
=================================  ==========================  =============================

Reference: f and g of Shoeybi et al., Megatron-LM, arXiv 1909.08053, section 3; g-bar of Korthikanti et al., Reducing
Activation Recomputation in Large Transformer Models, arXiv 2205.05198, section 4.2.2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

SEQUENCE = 1  # the dimension of activations that sequence parallelism divides


class Move(NamedTuple):
    """From one placement to another.

    Attributes:
        have: how the local tensor is placed that comes in.
        want: how the one that goes out is.
        grad: how the gradient of what goes out arrives.
    """

    have: Placement
    want: Placement
    grad: Placement


WHOLE, DIVIDED, ADDENDS = Replicate(), Shard(SEQUENCE), Partial()
COPY = Move(WHOLE, WHOLE, ADDENDS)
GATHER = Move(DIVIDED, WHOLE, ADDENDS)
SUM = Move(ADDENDS, WHOLE, WHOLE)
SCATTERED_SUM = Move(ADDENDS, DIVIDED, DIVIDED)
CUT = Move(WHOLE, DIVIDED, DIVIDED)
JOIN = Move(DIVIDED, WHOLE, WHOLE)


def enter(sequence: bool) -> Move:
    """What brings an activation to layers that are cut by columns, which each return an addend of its gradient."""
    return GATHER if sequence else COPY


def leave(sequence: bool) -> Move:
    """What makes an activation of the addends of layers that are cut by rows."""
    return SCATTERED_SUM if sequence else SUM


def moved(x: Tensor, mesh: Any, move: Move, name: str) -> Tensor:
    """A local tensor, placed otherwise.

    Arguments:
        mesh: DeviceMesh of one dimension.
        name: of the module at which it happens, for errors.

    Raises:
        ValueError: positions cannot be divided evenly; on every rank.
    """
    if move.want == DIVIDED and move.have != DIVIDED and x.shape[SEQUENCE] % mesh.size():
        raise ValueError(f"at {name} sequences of {x.shape[SEQUENCE]} positions cannot be divided over {mesh.size()} "
                         f"ranks of the tensor axis: with sequence=True give a multiple of {mesh.size()} positions, "
                         "padded where need be, or sequence=False")
    placed = DTensor.from_local(x, mesh, [move.have], run_check=False)
    if move.have != move.want:
        placed = placed.redistribute(placements=[move.want])
    return placed.to_local(grad_placements=[move.grad])


def first_moved(values: Any, mesh: Any, move: Move | None, name: str) -> Any:
    """A tensor, or the first of a tuple or list, moved."""
    if move is None:
        return values
    if isinstance(values, Tensor):
        return moved(values, mesh, move, name)
    if isinstance(values, (tuple, list)) and values and isinstance(values[0], Tensor):
        return type(values)([moved(values[0], mesh, move, name), *values[1:]])
    raise TypeError(f"{name} has {type(values).__name__} where a tensor, or a tuple that begins with one, is to be "
                    "placed over the tensor axis: take this module out of the plan, or give it a ParallelStyle of "
                    "your own")
