"""A batch in micro-batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def split(batch: Any, parts: int) -> list[Any]:
    """A batch in micro-batches, along the first dimension of its tensors.

    Arguments:
        batch: a tensor, or a dict, list or tuple of them (of equal lengths); other values go to all parts.

    Raises:
        ValueError: it cannot be divided into as many parts of one size.

    Example:
        >>> import torch
        >>> split({"x": torch.arange(4), "scale": 2.0}, 2)
        [{'x': tensor([0, 1]), 'scale': 2.0}, {'x': tensor([2, 3]), 'scale': 2.0}]
    """
    if parts == 1:
        return [batch]
    if isinstance(batch, Tensor):
        if len(batch) % parts:
            raise ValueError(f"a batch of {len(batch)} cannot be divided into {parts} micro-batches of one size")
        return list(batch.chunk(parts))
    if isinstance(batch, Mapping):
        divided = {name: split(value, parts) for name, value in batch.items()}
        return [{name: values[i] for name, values in divided.items()} for i in range(parts)]
    if isinstance(batch, (list, tuple)):
        inner = [split(value, parts) for value in batch]
        return [type(batch)(values[i] for values in inner) for i in range(parts)]
    return [batch] * parts
