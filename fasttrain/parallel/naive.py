"""Data parallelism in twenty lines: what explains and tests the fast version."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from fasttrain.dist.wire import Wire


class NaiveDataParallel:
    """The plain version: after backward, one mean over all gradients of a dtype.

    Construction gives every process the weights of rank 0. A parameter that took part on some processes only counts
    as zero on the others; one that took part on none keeps ``grad is None``.

    Args:
        model: the same on every process up to the values of its weights.
        wire: to the other processes.

    Example:
        loss_of(model, batch).backward()
        parallel.average_gradients()
        optimizer.step()
    """

    def __init__(self, model: nn.Module, wire: Wire):
        self.wire = wire
        self.params = [p for p in model.parameters() if p.requires_grad]
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            tensor.detach().copy_(wire.broadcast_(tensor.detach().contiguous()))

    @torch.no_grad()
    def average_gradients(self) -> None:
        """Replace every gradient by its mean over the processes: one buffer and one collective for each dtype."""
        if self.wire.size == 1:
            return
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for p in self.params:
            by_dtype.setdefault(p.dtype, []).append(p)
        for dtype, params in by_dtype.items():
            used = torch.tensor([p.grad is not None for p in params]).to(self.wire.device, dtype)
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            flat = self.wire.mean_(torch.cat([used, *(g.flatten() for g in grads)]))
            used, *means = flat.split([len(params), *(p.numel() for p in params)])
            for p, grad, anywhere, mean in zip(params, grads, used.tolist(), means, strict=True):
                p.grad = grad.copy_(mean.view_as(grad)) if anywhere else None
