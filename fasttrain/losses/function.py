"""Cross-entropy outside of compiled graphs: the operators of `fasttrain.losses.ops`, and a third of their host time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fasttrain.kernels import cross_entropy as kernel
from fasttrain.kernels.cross_entropy import Terms
from fasttrain.losses import ops

Gather = Callable[[Tensor], Tensor]


class CrossEntropyFunction(torch.autograd.Function):
    """(the loss; losses of rows; their z terms; rows that count; correct ones), as of the operator.

    With `gather` the logits are columns of some classes, and it returns the parts of all ranks.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, terms: Terms, reduction: str, inplace: bool,
                gather: Gather | None) -> tuple[Tensor, ...]:
        if gather is None:
            found = kernel.measure(logits, targets, terms)
        else:
            parts = kernel.combine(gather(kernel.measure_part(logits, targets, terms)))
            found = kernel.finish(parts, targets, terms)
        ctx.save_for_backward(logits, targets, found.parts, found.counted)
        ctx.terms, ctx.reduction, ctx.inplace, ctx.whole = terms, reduction, inplace, gather is None
        ctx.set_materialize_grads(False)
        others = found.losses.view(targets.shape), found.z.view(targets.shape), found.counted, found.correct
        ctx.mark_non_differentiable(*others)
        return ops.reduced(found, reduction).view(targets.shape if reduction == "none" else ()), *others

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 5
        if grad is None:
            return None, *nothing
        logits, targets, parts, counted = ctx.saved_tensors
        scales = ops.scales_of(grad, counted, parts, ctx.reduction)
        if not torch.is_grad_enabled():
            out = logits.detach() if ctx.inplace else None
            found = kernel.differentiate(logits.detach(), targets, ctx.terms, parts, scales, out)
            if ctx.inplace:
                torch.autograd.graph.increment_version(logits)
            return found, *nothing
        if ctx.inplace or not ctx.whole:
            ops.no_second()
        _, _, ignore_index, *numbers = ctx.terms
        return ops.cross_entropy_backward(logits, targets, parts, scales, *numbers, ignore_index), *nothing
