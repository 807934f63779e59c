"""Batches on their way to a device: from pinned memory, on a stream beside the one that computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Upload:
    """Copies to one GPU that neither the host nor the computing stream waits for before it must.

    `send` queues a copy on a stream of its own. `receive` makes the current stream wait for it, the host does not, and
    keeps the memory from being given to the other stream's next copy while the current one may still read it. Pinned
    memory comes from torch's pool, which uses it again only after the copies from it.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def send(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
        """Queue copies of tensors in ordinary memory; the copies, and the event of the last."""
        with torch.cuda.stream(self.stream):
            sent = {name: tensor.pin_memory().to(self.device, non_blocking=True) for name, tensor in batch.items()}
            event = torch.cuda.Event()
            event.record(self.stream)
        return sent, event

    def receive(self, sent: dict[str, Tensor], event: Any) -> dict[str, Tensor]:
        """The copies, for use on the current stream."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)
        for tensor in sent.values():
            tensor.record_stream(current)
        return sent


class Stay:
    """Batches that stay in the host's memory."""

    def send(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
        return batch, None

    def receive(self, sent: dict[str, Tensor], event: Any) -> dict[str, Tensor]:
        return sent


def upload_to(device: torch.device) -> Upload | Stay:
    """The way to a device.

    Raises:
        ValueError: it is neither the host nor a GPU of CUDA's.
    """
    if device.type == "cpu":
        return Stay()
    if device.type != "cuda":
        raise ValueError(f"device={device}: batches go to 'cpu' or 'cuda'; copy them elsewhere yourself")
    if not torch.cuda.is_available():
        raise ValueError(f"device={device}: this torch finds no GPU; use device=None")
    return Upload(device)
