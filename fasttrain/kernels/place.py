"""Torch's side of a GPU: what a step needs from it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """One GPU. Work goes to torch's current stream of it, as that of any function of torch: after what is queued there,
    gradients for example, and before what will be, which reads the parameters. Where nobody chose a stream this is
    torch's default one, whose handle is 0, CUDA's legacy stream; no other use is made of that.
    """

    device: torch.device

    def ordinal(self) -> int:
        if self.device.index is not None:
            return self.device.index
        return torch.cuda.current_device() if torch.cuda.is_available() else 0

    def guard(self) -> AbstractContextManager[Any]:
        """Makes it the current device."""
        return torch.cuda.device(self.device)

    def stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream

    def capturing(self) -> bool:
        """Whether what is queued now becomes a CUDA graph."""
        return torch.cuda.is_current_stream_capturing()

    def empty(self, size: int) -> Tensor:
        """Memory of so many bytes, which torch gives to nobody but later work of this stream when it is dropped."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def pinned(self, size: int) -> Tensor:
        """Memory of the host that the device can copy from while the host goes on."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Queue a copy from pinned memory."""
        to.copy_(source, non_blocking=True)

    def event(self) -> Any:
        return torch.cuda.Event()

    def record(self, event: Any) -> None:
        """The event happens when all that is queued so far is done."""
        event.record(torch.cuda.current_stream(self.device))


class Happened:
    """An event of a place where everything is done when it is queued."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Nothing is waited for."""


class Near(Place):
    """Memory that is no NVIDIA GPU's, for what runs there: the host's, say, for Triton's interpreter. Copies are done
    when they are queued.
    """

    def ordinal(self) -> int:
        return self.device.index or 0

    def guard(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def stream(self) -> int:
        return 0

    def capturing(self) -> bool:
        return False

    def pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def copy(self, to: Tensor, source: Tensor) -> None:
        to.copy_(source)

    def event(self) -> Any:
        return Happened()

    def record(self, event: Any) -> None:
        """It has happened."""


def place_of(device: torch.device) -> Place:
    """Torch's side of any device."""
    return Place(device) if device.type == "cuda" else Near(device)
