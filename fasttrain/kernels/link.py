"""Torch's side of the way between a GPU and the host: a stream for each direction, and pinned memory."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor

PAGE = 4096  # bytes
Pairs = Sequence[tuple[Tensor, Tensor]]  # where to, where from


class Link:
    """The way between one GPU and the host. `down` is towards the host.

    Neither direction waits for the other, nor for torch's current stream but where it is told to. Whoever asks for a
    copy keeps both tensors alive, and writes neither, until its event has happened.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._down, self._up = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def mark(self) -> Any:
        """An event that happens when all that is queued on the current stream so far is done."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def down(self, pairs: Pairs, after: Sequence[Any]) -> Any:
        """Queue copies to pinned memory behind events; the event of the last."""
        return self._queue(self._down, pairs, after)

    def up(self, pairs: Pairs, after: Sequence[Any]) -> Any:
        """Queue copies from pinned memory behind events; the event of the last."""
        return self._queue(self._up, pairs, after)

    def _queue(self, stream: torch.cuda.Stream, pairs: Pairs, after: Sequence[Any]) -> Any:
        with torch.cuda.stream(stream), torch.no_grad():  # makes the stream's device the current one as well
            for event in after:
                stream.wait_event(event)
            for to, source in pairs:
                to.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        return event

    def hold(self, event: Any) -> None:
        """What is queued on the current stream from now on waits for an event; the host does not."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def wait(self, event: Any) -> None:
        """The host waits for an event."""
        event.synchronize()

    def pinned(self, size: int) -> Tensor:
        """So many bytes of the host, locked in memory. Torch's own allocator would take the next power of two.

        Raises:
            RuntimeError: the operating system or the driver does not lock as much.
        """
        whole = torch.empty(size + PAGE, dtype=torch.uint8)
        begin = -whole.data_ptr() % PAGE
        memory = whole[begin:begin + size]
        if size:
            runtime = torch.cuda.cudart()
            with torch.cuda.device(self.device):
                refused = int(runtime.cudaHostRegister(memory.data_ptr(), size, 1))  # portable: for every device
            if refused:
                with suppress(RuntimeError):  # the runtime would report this error to whoever launches a kernel next
                    torch.ones(1, device=self.device)
                raise RuntimeError(f"cudaHostRegister of {size} bytes returned error {refused}")
            weakref.finalize(memory.untyped_storage(), _unregister, memory.data_ptr()).atexit = False
        return memory


def _unregister(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)


@cache
def _link(device: torch.device) -> Link:
    return Link(device)


def link_of(device: torch.device) -> Link | None:
    """The way to a device; None: it is the host.

    Raises:
        TypeError: it is neither the host nor a GPU of CUDA's.
    """
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        raise TypeError(f"offload=True moves states from GPUs of CUDA to the host; there is a parameter on {device}")
    return _link(device)
