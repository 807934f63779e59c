"""Comm hooks of torch's DistributedDataParallel as a way for buckets to travel.

A hook is `hook(state, bucket) -> Future[Tensor]`; those of `torch.distributed.algorithms.ddp_comm_hooks` (bf16 and fp16
compression, PowerSGD, post-local SGD) work unchanged. It returns the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fasttrain.parallel.buckets import Bucket
from fasttrain.parallel.wires import Method, Sent, own_part


class GradBucket:
    """What a hook is given: the methods of `torch.distributed.GradBucket`, which cannot be made from Python."""

    def __init__(self, index: int, bucket: Bucket, last: bool):
        self._index, self._bucket, self._last, self._buffer = index, bucket, last, bucket.data

    def index(self) -> int:
        """Its place in the order of sending."""
        return self._index

    def buffer(self) -> Tensor:
        """All gradients, flat, with the padding at the end."""
        return self._buffer

    def gradients(self) -> list[Tensor]:
        """A view of the buffer for each parameter."""
        return list(self._bucket.slots.views)

    def parameters(self) -> list[Tensor]:
        """The parameters, in the order of `gradients`."""
        return list(self._bucket.params)

    def is_last(self) -> bool:
        """Whether it is the last bucket of the step."""
        return self._last

    def set_buffer(self, tensor: Tensor) -> None:
        """Replace the buffer by a tensor of its size."""
        self._buffer = tensor


class _Pending:
    """A future, with the ways of a `Work`."""

    def __init__(self, method: Method, future: torch.futures.Future[Any], data: Tensor):
        self.method, self.future, self.data = method, future, data

    def done(self) -> bool:
        return self.future.done()

    def wait(self) -> None:
        value = self.future.wait()
        result = value[0] if isinstance(value, (list, tuple)) else value
        if not isinstance(result, Tensor) or result.numel() != self.data.numel():
            raise TypeError(f"the comm hook returned {type(result).__name__} "
                            f"{tuple(getattr(result, 'shape', ()))}: it must be a tensor of the bucket's "
                            f"{self.data.numel()} elements")
        if result.data_ptr() != self.data.data_ptr():
            self.data.copy_(result.reshape(-1))


class TorchHook(Method):
    """Buckets travel by a comm hook with torch's signature; see `Reducer.register_comm_hook`."""

    name = "hook"

    def __init__(self, state: Any, hook: Callable[[Any, Any], torch.futures.Future[Any]]):
        super().__init__()
        self.state, self.hook = state, hook

    def send(self, index: int, bucket: Bucket) -> Sent:
        self.issued(index, len(bucket.data))
        given = GradBucket(index, bucket, index == len(self.layout.buckets) - 1)
        future = self.hook(self.state, given)
        if not (hasattr(future, "wait") and hasattr(future, "done")):  # torch's own has several classes
            raise TypeError(f"the comm hook returned {type(future).__name__}: it must be a torch.futures.Future")
        return Sent(_Pending(self, future, bucket.data), own_part(bucket.data, self.wire))
