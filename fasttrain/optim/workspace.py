"""Scratch memory that an optimizer allocates once and keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Workspace:
    """One stretch of memory for each role, dtype and device; a role's tensor is overwritten by its next one.

    Example:
        >>> import torch
        >>> space = Workspace()
        >>> a = space.take("gram", (2, 3), torch.float32, torch.device("cpu"))
        >>> b = space.take("gram", (5,), torch.float32, torch.device("cpu"))
        >>> a.data_ptr() == b.data_ptr(), space.made
        (True, 1)

    Attributes:
        made: stretches of memory that were allocated so far.
    """

    def __init__(self) -> None:
        self.made = 0
        self._memory: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, role: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous tensor whose elements hold anything."""
        key, elements = (role, dtype, device), math.prod(shape)
        if key not in self._memory or self._memory[key].numel() < elements:
            self.made += 1
            self._memory[key] = torch.empty(elements, dtype=dtype, device=device)
        return self._memory[key][:elements].view(tuple(shape))
