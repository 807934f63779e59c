"""Cross-entropy as operators of torch, so that a compiled graph holds them whole."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from fasttrain.kernels import cross_entropy as kernel
from fasttrain.kernels.cross_entropy import Terms

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("fasttrain::cross_entropy", mutates_args=())
def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float, z_loss: float, ignore_index: int,
                  reduction: str, inplace_backward: bool) -> Outputs:
    """(the loss, which alone has a derivative; losses of rows; their z terms; rows that count; correct ones; parts)."""
    terms = Terms(0, logits.shape[-1], ignore_index, label_smoothing, z_loss)
    found = kernel.measure(logits, targets, terms)
    loss = reduced(found, reduction).reshape(targets.shape if reduction == "none" else ())
    return (loss, found.losses.reshape(targets.shape), found.z.reshape(targets.shape), found.counted, found.correct,
            found.parts)


def reduced(found: kernel.Measured, reduction: str) -> Tensor:
    """The loss that is asked for."""
    if reduction == "none":
        return found.losses + found.z
    return (found.total / found.counted if reduction == "mean" else found.total).to(found.losses.dtype)


def scales_of(grad: Tensor, counted: Tensor, parts: Tensor, reduction: str) -> Tensor:
    """What the losses of rows are multiplied with, given the derivative by the loss: of each row, or one for all."""
    return (grad / counted if reduction == "mean" else grad).to(parts.dtype).reshape(-1)


@cross_entropy.register_fake
def _(logits: Tensor, targets: Tensor, label_smoothing: float, z_loss: float, ignore_index: int, reduction: str,
      inplace_backward: bool) -> Outputs:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = (logits.new_empty(targets.shape, dtype=dtype) for _ in "lz")
    counts = (logits.new_empty((), dtype=torch.int64) for _ in "nc")
    loss = logits.new_empty(targets.shape if reduction == "none" else (), dtype=dtype)
    parts = logits.new_empty((targets.numel(), kernel.PARTS), dtype=dtype)
    return loss, *rows, *counts, parts  # type: ignore[return-value]


@torch.library.custom_op("fasttrain::cross_entropy_backward", mutates_args=())
def cross_entropy_backward(logits: Tensor, targets: Tensor, parts: Tensor, scales: Tensor, label_smoothing: float,
                           z_loss: float, ignore_index: int) -> Tensor:
    """The derivative by the logits of the sum of ``scales * loss``."""
    terms = Terms(0, logits.shape[-1], ignore_index, label_smoothing, z_loss)
    return kernel.differentiate(logits, targets, terms, parts, scales, None)


@cross_entropy_backward.register_fake
def _(logits: Tensor, *others: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.custom_op("fasttrain::cross_entropy_backward_", mutates_args=("logits",))
def cross_entropy_backward_(logits: Tensor, targets: Tensor, parts: Tensor, scales: Tensor, label_smoothing: float,
                            z_loss: float, ignore_index: int) -> None:
    """The same, written over the logits."""
    terms = Terms(0, logits.shape[-1], ignore_index, label_smoothing, z_loss)
    kernel.differentiate(logits, targets, terms, parts, scales, logits)


def no_second(*_: Any) -> NoReturn:
    raise NotImplementedError("fasttrain's cross-entropy has no second derivative (create_graph=True was asked for): "
                              "use torch.nn.functional.cross_entropy where one is needed")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    logits, targets, *ctx.numbers, ctx.reduction, ctx.inplace = inputs
    *_, count, _, parts = output
    ctx.save_for_backward(logits, targets, parts, count)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 6
    if grad is None:
        return None, *nothing
    logits, targets, parts, count = ctx.saved_tensors
    scales = scales_of(grad, count, parts, ctx.reduction)
    if ctx.inplace:
        if torch.is_grad_enabled():
            no_second()
        logits = logits.detach()
        cross_entropy_backward_(logits, targets, parts, scales, *ctx.numbers)
        return logits, *nothing
    return cross_entropy_backward(logits, targets, parts, scales, *ctx.numbers), *nothing


cross_entropy.register_autograd(_backward, setup_context=_setup)
cross_entropy_backward.register_autograd(no_second)
