"""The operators of `fasttrain.losses.linear`: logits are made, used and overwritten a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fasttrain.kernels import cross_entropy as kernel
from fasttrain.kernels.cross_entropy import Terms
from fasttrain.losses.ops import no_second

Grads = tuple[Tensor, Tensor, Tensor]
CLASSES = 8192


class Sums:
    """The derivatives by hidden, weight and bias, as chunks are added; empty tensors of what is not needed."""

    def __init__(self, hidden: Tensor, weight: Tensor, needed: list[bool], several: bool):
        exact = torch.promote_types(weight.dtype, torch.float32)
        self.needed, self.dtype = needed, weight.dtype
        self.plain = exact == weight.dtype or not several  # added where it lies, with no tensor of its size beside it
        self.hidden = hidden.new_empty(hidden.shape if needed[0] else (0,))
        self.weight = weight.new_zeros(weight.shape if needed[1] else (0,), dtype=weight.dtype if self.plain else exact)
        self.bias = weight.new_zeros(len(weight) if needed[2] else 0, dtype=exact)

    def add(self, at: slice, by_logits: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Some rows of hidden, given the derivative by their logits."""
        if self.needed[0]:
            torch.mm(by_logits, weight, out=self.hidden[at])
        if self.needed[1] and self.plain:
            self.weight.addmm_(by_logits.t(), hidden[at])
        elif self.needed[1]:  # some classes at a time: a product as large as the weight would stand beside the sum
            for first in range(0, len(weight), CLASSES):
                some = slice(first, first + CLASSES)
                self.weight[some].add_(torch.mm(by_logits[:, some].t(), hidden[at]))
        if self.needed[2]:
            self.bias.add_(by_logits.sum(0, dtype=self.bias.dtype))

    def ended(self, shape: torch.Size) -> Grads:
        """All of them, that by hidden in its shape."""
        return (self.hidden.reshape(shape) if self.needed[0] else self.hidden, self.weight.to(self.dtype),
                self.bias.to(self.dtype))


def chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Iterator[tuple[slice, Tensor]]:
    """(which rows, their logits), one after the other, all in one buffer."""
    buffer = hidden.new_empty(min(rows, len(hidden)), len(weight))
    for begin in range(0, len(hidden), rows):
        at = slice(begin, min(begin + rows, len(hidden)))
        logits = buffer[: at.stop - begin]
        if bias is None:
            torch.mm(hidden[at], weight.t(), out=logits)
        else:
            torch.addmm(bias, hidden[at], weight.t(), out=logits)
        yield at, logits


@torch.library.custom_op("fasttrain::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int,
                         label_smoothing: float, z_loss: float, ignore_index: int, reduction: str,
                         needed: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(the loss, parts of rows, derivatives of the loss by hidden, weight and bias).

    The derivatives are empty where they are not needed, and where every row has a loss of its own.
    """
    terms = Terms(0, len(weight), ignore_index, label_smoothing, z_loss)
    flat, classes = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    kernel.check_classes(classes, terms)  # where rows have their own numbers
    exact, device = torch.promote_types(hidden.dtype, torch.float32), hidden.device
    count = (classes != ignore_index).sum() if reduction == "mean" else torch.ones((), device=device)
    scale = torch.ones((), dtype=exact, device=device) / count
    total = torch.zeros((), dtype=torch.float64, device=device)
    parts, rows = flat.new_empty(len(flat), kernel.PARTS, dtype=exact), flat.new_empty(len(flat), dtype=exact)
    sums = Sums(flat, weight, needed if reduction != "none" else [False] * 3, len(flat) > chunk)
    with torch.autocast(device.type, enabled=False):
        for at, logits in chunks(flat, weight, bias, chunk):
            found = kernel.measure(logits, classes[at], terms)
            parts[at], rows[at] = found.parts, found.losses + found.z
            total += found.total
            if any(sums.needed):
                kernel.differentiate(logits, classes[at], terms, found.parts, scale, logits)
                sums.add(at, logits, flat, weight)
    loss = rows.reshape(targets.shape) if reduction == "none" else (total / count).to(exact)
    return loss, parts, *sums.ended(hidden.shape)


@linear_cross_entropy.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int, label_smoothing: float,
      z_loss: float, ignore_index: int, reduction: str, needed: list[bool]) -> tuple[Tensor, ...]:
    exact = torch.promote_types(hidden.dtype, torch.float32)
    loss = hidden.new_empty(targets.shape if reduction == "none" else (), dtype=exact)
    return (loss, hidden.new_empty((targets.numel(), kernel.PARTS), dtype=exact),
            *_empty(hidden, weight, needed if reduction != "none" else [False] * 3))


def _empty(hidden: Tensor, weight: Tensor, needed: list[bool]) -> Grads:
    shapes: list[Any] = [hidden.shape, weight.shape, weight.shape[:1]]
    made = [hidden.new_empty(shape if wanted else (0,)) for shape, wanted in zip(shapes, needed, strict=True)]
    return made[0], made[1], made[2]


@torch.library.custom_op("fasttrain::linear_cross_entropy_backward", mutates_args=())
def linear_backward(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, parts: Tensor, scales: Tensor,
                    chunk: int, label_smoothing: float, z_loss: float, ignore_index: int,
                    needed: list[bool]) -> Grads:
    """The derivatives of the sum of ``scales * loss``, with a scale for each row: the logits are made again."""
    terms = Terms(0, len(weight), ignore_index, label_smoothing, z_loss)
    flat, classes = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    sums = Sums(flat, weight, needed, len(flat) > chunk)
    with torch.autocast(hidden.device.type, enabled=False):
        for at, logits in chunks(flat, weight, bias, chunk):
            kernel.differentiate(logits, classes[at], terms, parts[at], scales[at], logits)
            sums.add(at, logits, flat, weight)
    return sums.ended(hidden.shape)


@linear_backward.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, parts: Tensor, scales: Tensor, chunk: int,
      label_smoothing: float, z_loss: float, ignore_index: int, needed: list[bool]) -> Grads:
    return _empty(hidden, weight, needed)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, *ctx.numbers, reduction, ctx.needed = inputs
    _, parts, *grads = output
    ctx.one = reduction != "none"
    ctx.has_bias = bias is not None
    ctx.save_for_backward(*(grads if ctx.one else (hidden, weight, targets, parts, *([bias] * ctx.has_bias))))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    if ctx.one:
        found = [each * grad.to(each.dtype) for each in ctx.saved_tensors]
    else:
        hidden, weight, targets, parts, *bias = ctx.saved_tensors
        scales = grad.to(parts.dtype).reshape(-1)
        found = linear_backward(hidden, weight, bias[0] if bias else None, targets, parts, scales, *ctx.numbers,
                                ctx.needed)
    by_hidden, by_weight, by_bias = (each if needed else None for each, needed in zip(found, ctx.needed, strict=True))
    return by_hidden, by_weight, by_bias, *(None,) * 7


linear_cross_entropy.register_autograd(_backward, setup_context=_setup)
linear_backward.register_autograd(no_second)
