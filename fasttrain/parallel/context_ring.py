"""Ring attention by torch's context-parallel API, behind a check of what this torch and this device have.

torch exchanges `F.scaled_dot_product_attention` and the operators behind it while its context is entered, which has to
hold the backward pass too. It cuts sequences as `ContextParallel` does where that is balanced.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

_plain = F.scaled_dot_product_attention


def check(device: torch.device, balanced: bool, mesh: DeviceMesh | None) -> None:
    """Raise ValueError, on every rank alike, unless a ring can run."""
    if device.type != "cuda":
        raise ValueError(f"method='ring' on {device}: torch has ring attention for GPUs only; use method='gather', "
                         "which runs everywhere")
    _entering()
    if not balanced:
        raise ValueError("method='ring' with balanced=False: torch cuts sequences into balanced pairs of chunks; leave "
                         "balanced out, or use method='gather'")
    if mesh is None:
        raise ValueError("method='ring' over a Wire: torch needs a DeviceMesh; give a Mesh")


def _entering() -> Any:
    try:
        from torch.distributed.tensor.experimental import context_parallel
    except ImportError as error:
        raise ValueError(f"method='ring': torch {torch.__version__} has no context_parallel in "
                         "torch.distributed.tensor.experimental; use method='gather'") from error
    return context_parallel


@contextmanager
def entered(mesh: DeviceMesh, length: int) -> Iterator[None]:
    """torch's context for sequences of `length` positions; it learns the length from a buffer."""
    buffer = torch.arange(length, device=mesh.device_type)
    with _entering()(mesh, buffers=[buffer], buffer_seq_dims=[0], no_restore_buffers={buffer}):
        yield


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    """Attention within the context; torch's ring knows no shared heads, so they travel once for each query head.

    Raises:
        RuntimeError: the context has not been entered: each rank would attend to its own positions only.
    """
    if F.scaled_dot_product_attention is _plain:
        raise RuntimeError("ring attention outside of its context: run forward and backward within "
                           "`with context.step(length):`")
    times = q.shape[1] // k.shape[1]
    if times > 1:
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
