"""Memory that exchanges work in, kept from step to step: fresh memory costs more to touch than a message to read."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Scratch:
    """Flat tensors to be taken and given back, by any thread. On a GPU torch itself keeps memory.

    It grows to what was taken at one time, and keeps tensors of exactly the sizes asked for.

    Example:
        >>> scratch = Scratch(torch.device("cpu"))
        >>> place = (taken := scratch.take(4, torch.float32)).data_ptr()
        >>> scratch.give([taken])
        >>> scratch.take(8, torch.bfloat16).data_ptr() == place
        True
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._spare: dict[int, list[Tensor]] = {}

    def take(self, elements: int, dtype: torch.dtype) -> Tensor:
        """Uninitialized memory; nobody else has it until it is given back."""
        nbytes = elements * dtype.itemsize
        try:
            return self._spare[nbytes].pop().view(dtype)  # one operation: another thread may take at the same time
        except (KeyError, IndexError):
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device).view(dtype)

    def give(self, tensors: Iterable[Tensor]) -> None:
        """Give back what was taken, when nothing uses it any more."""
        if self.device.type == "cpu":
            for tensor in tensors:
                self._spare.setdefault(tensor.nbytes, []).append(tensor.view(torch.uint8))
