"""A batch in micro-batches, and what tells one kind of batch from another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


def divided(given: Any, micro_batches: int, what: str) -> list[Any]:
    """Equal parts of all tensors in nested lists, tuples and mappings, along the first dimension; the rest in each.

    Raises:
        ValueError: it does not divide, or tensors have different numbers of samples.

    Example:
        >>> [part["x"].tolist() for part in divided({"x": torch.arange(4)}, 2, "inputs")]
        [[0, 1], [2, 3]]
    """
    leaves, shape = tree_flatten(given)
    sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in leaves if isinstance(leaf, Tensor)}
    if not sizes:
        return [given] * micro_batches
    if len(sizes) > 1:
        raise ValueError(f"the tensors of {what} have {' and '.join(map(str, sorted(sizes)))} samples: they are cut "
                         "along the first dimension, which must be the same for all")
    samples = sizes.pop()
    if not samples or samples % micro_batches:
        fewer = [count for count in range(1, micro_batches) if samples and samples % count == 0]
        raise ValueError(
            f"{what} of {samples} samples do not divide into {micro_batches} micro-batches: give a multiple of "
            f"{micro_batches} samples" + (f", or take {fewer[-1]} micro-batches" if fewer else "")
            + "; a smaller last batch is to be dropped or filled up")
    parts = [leaf.split(samples // micro_batches) if isinstance(leaf, Tensor) else [leaf] * micro_batches
             for leaf in leaves]
    return [tree_unflatten(list(part), shape) for part in zip(*parts, strict=True)]


def samples(given: Any) -> int:
    """How many there are.

    Example:
        >>> samples({"x": torch.ones(4, 2), "name": "a"})
        4
    """
    return next((leaf.shape[0] for leaf in tree_flatten(given)[0] if isinstance(leaf, Tensor) and leaf.ndim), 0)


def shape_of(given: Any, device: torch.device) -> tuple[Any, ...]:
    """What a schedule is made for: shapes and dtypes of a micro-batch, and whether autocast is on.

    Example:
        >>> shape_of(torch.ones(2, 3), torch.device("cpu"))
        (((2, 3), torch.float32), None)
    """
    leaves, _ = tree_flatten(given)
    cast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return *((tuple(leaf.shape), leaf.dtype) for leaf in leaves if isinstance(leaf, Tensor)), cast
