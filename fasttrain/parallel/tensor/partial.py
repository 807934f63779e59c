"""Parameters of which every rank of the tensor axis has a copy, and whose gradient is a sum over that axis.

Under sequence parallelism a norm sees a part of the positions on each rank, so its weight's gradient arrives as a
DTensor placed Partial, though the weight is placed Replicate. What adds up gradients over data-parallel ranks can add
these up over the tensor axis in the same collective, if it knows of them before the first backward pass: a plan
declares them. One that is not declared is settled when it arrives (`fasttrain.optim.local.settle`).
"""

from __future__ import annotations

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_partial: WeakIdKeyDictionary = WeakIdKeyDictionary()  # the parameter lives no longer for being declared


def declare(p: Tensor) -> None:
    """Let the local gradients of a parameter be addends over the ranks of the tensor axis.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> declare(weight)
        >>> declared(weight)
        True
    """
    _partial[p] = True


def declared(p: Tensor) -> bool:
    """Whether the local gradients of a parameter are addends over the ranks of the tensor axis."""
    return p in _partial
