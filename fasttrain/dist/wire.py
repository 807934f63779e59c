"""The only file that makes process groups and issues collectives.

A `Wire` is passed to whoever needs one; nothing here is global, and there is one place to replace in a test.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class WireError(RuntimeError):
    """A collective failed: a peer ended, or did not answer in time. The peer's own report says why."""


class Wire:
    """One process's place among `size`, and the collectives they share.

    Args:
        device: where the tensors live. A CPU speaks gloo, a GPU NCCL.
        timeout_s: seconds after which a peer that does not answer is given up.
        options: handed to ``torch.distributed.init_process_group``. Without any, rank, size and address come from the
            environment, as torchrun sets it.

    Raises:
        WireError: the peers did not meet in time.
    """

    def __init__(self, device: torch.device, timeout_s: float = 120, **options: Any):
        self.device = device
        backend = "nccl" if device.type == "cuda" else "gloo"
        if backend == "nccl":
            options["device_id"] = device
        options["timeout"] = timedelta(seconds=timeout_s)
        self._try("meeting the other processes", lambda: dist.init_process_group(backend, **options))
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def mean_(self, tensor: Tensor) -> Tensor:
        """Replace a floating-point tensor by its mean over the processes, in place, the same bits on each.

        Each divides before the sum, so that no intermediate value is larger than the largest input.
        """
        return self.sum_(tensor.div_(self.size))

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over the processes, in place, the same bits on each."""
        self._try("all_reduce", lambda: dist.all_reduce(tensor))
        return tensor

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by that of rank 0, in place."""
        self._try("broadcast", lambda: dist.broadcast(tensor, src=0))
        return tensor

    def close(self) -> None:
        """Leave the group, after every process has finished its collectives. Never call it after an error."""
        dist.destroy_process_group()

    def _try(self, what: str, work: Callable[[], Any]) -> None:
        try:
            work()
        except RuntimeError as error:
            raise WireError(f"{what} failed: {str(error).strip().splitlines()[0]}") from error
