"""Cross-entropy by backend, and its oracle in eager torch.

Two passes over the logits and no more: `measure` reads them once, `differentiate` reads them once and writes their
derivative, where they lie if that is wanted. Between the two, five numbers are known of each row (`PARTS`): the largest
logit ``m``, the sum of ``exp(x - m)``, the logit of the target (NaN if it is elsewhere), the sum of ``x - m`` where
labels are smoothed, and how many columns there are. Those of pieces of rows make those of the whole (`combine`).

Arithmetic is in fp32, in fp64 for float64 logits (these run in eager torch, on any device). On the CPU the bits are the
same for any instruction set and any number of threads (csrc/cpu/cross_entropy.h). Triton has another order of sums, and
the hardware's exp: a polynomial would take twice the instructions that an H200 issues while it reads 16-bit logits. So
backends agree within bounds, which docs/losses.md states, and each repeats its own bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttrain.kernels import dispatch, native

PARTS = 5
SUPPORTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDICES = (torch.int64, torch.int32, torch.uint8)


class Terms(NamedTuple):
    """What a loss is made of.

    Attributes:
        first: the class of the first column; other than 0 where classes are divided over ranks.
        vocabulary: how many classes there are.
        ignore_index: the target of rows that count for nothing.
    """

    first: int
    vocabulary: int
    ignore_index: int
    label_smoothing: float
    z_loss: float


class Measured(NamedTuple):
    """What one pass tells.

    Attributes:
        parts: (rows, 5).
        losses: of each row, without the z term; 0 of rows that are ignored.
        z: the z term of each row.
        total: sum of both over the rows, float64.
        counted: rows that are not ignored, int64.
        correct: of those, the rows whose target has the largest logit, int64.
    """

    parts: Tensor
    losses: Tensor
    z: Tensor
    total: Tensor
    counted: Tensor
    correct: Tensor


def rows_of(logits: Tensor) -> Tensor:
    """The same logits in three dimensions (groups, rows, classes), classes side by side: a view where that is possible.

    Example:
        >>> rows_of(torch.zeros(4, 6, 5)[:, :-1]).stride()
        (30, 5, 1)
    """
    classes = logits.shape[-1]
    if logits.stride(-1) != 1 and classes > 1:
        logits = logits.contiguous()
    if logits.dim() <= 3:
        return logits[(None,) * (3 - logits.dim())]
    if logits.numel() == 0:
        return logits.reshape(1, logits[..., 0].numel() if classes else logits.shape[:-1].numel(), classes)
    try:
        return logits.view(-1, logits.shape[-2], classes)
    except RuntimeError:  # torch has no other way to ask whether a view exists
        return logits.reshape(1, -1, classes)


def indices_of(targets: Tensor) -> Tensor:
    """Targets as the kernels take them: flat, of one of `INDICES`."""
    flat = targets.reshape(-1).contiguous()
    return flat if flat.dtype in INDICES else flat.long()


def measure(logits: Tensor, targets: Tensor, terms: Terms, backend: str | None = None) -> Measured:
    """One pass over logits of shape (..., classes), all of which are here; targets of shape (...).

    Raises:
        IndexError: a target in CPU memory is no class. On a GPU, which would have to be waited for, the losses and
            derivatives of such rows are NaN.
    """
    return _choose(MEASURE, logits, backend)(logits, targets, terms, True)


def measure_part(logits: Tensor, targets: Tensor, terms: Terms, backend: str | None = None) -> Tensor:
    """The parts of the columns that are here, the first of which is class ``terms.first``; see `combine`, `finish`."""
    return _choose(MEASURE, logits, backend)(logits, targets, terms, False).parts


def differentiate(logits: Tensor, targets: Tensor, terms: Terms, parts: Tensor, scales: Tensor, out: Tensor | None,
                  backend: str | None = None) -> Tensor:
    """The derivative by the logits of the sum of ``scales * loss``.

    Arguments:
        parts: of each row, over all classes.
        scales: of each row, or one number for all; of the dtype of `parts`.
        out: where to write it, `logits` perhaps; None for a new tensor.
    """
    if out is None:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    elif rows_of(out).data_ptr() != out.data_ptr():  # of a layout that was copied
        return out.copy_(differentiate(logits, targets, terms, parts, scales, None, backend))
    _choose(DIFFERENTIATE, logits, backend)(logits, targets, terms, parts, scales.reshape(-1).contiguous(), out)
    return out


def _choose(table: dict[str, Callable[..., Any]], logits: Tensor, backend: str | None) -> Callable[..., Any]:
    if logits.dtype == torch.float64:
        return table["reference"]
    if backend is None:  # in CPU memory nothing needs the others
        on_cpu = "reference" if native.load()[0] is None else "cpu"
        backend = on_cpu if logits.device.type == "cpu" else dispatch.choose(logits.device)
    return dispatch.choose_from(table, backend, logits.device)


def only(parts: Tensor) -> Measured:
    """What is known of pieces of rows."""
    nothing = parts.new_empty(0)
    return Measured(parts, nothing, nothing, nothing, nothing, nothing)


# --- Backends ---------------------------------------------------------------------------------------------------------

def _measure_native(logits: Tensor, targets: Tensor, terms: Terms, whole: bool) -> Measured:
    rows, classes = rows_of(logits), indices_of(targets)
    parts = torch.empty(len(classes), PARTS)
    losses, z = (torch.empty(len(classes)) if whole else None for _ in "lz")
    row, count, correct, loss, extra = native.module().cross_entropy_measure(
        native.reader(), rows, classes, tuple(terms), parts, losses, z, torch.get_num_threads())
    if row >= 0:
        raise no_class(classes, row, terms)
    if losses is None or z is None:
        return only(parts)
    return Measured(parts, losses, z, torch.tensor(loss + extra, dtype=torch.float64), torch.tensor(count),
                    torch.tensor(correct))


def _differentiate_native(logits: Tensor, targets: Tensor, terms: Terms, parts: Tensor, scales: Tensor,
                          out: Tensor) -> None:
    native.module().cross_entropy_differentiate(native.reader(), rows_of(logits), indices_of(targets), tuple(terms),
                                                parts, scales, rows_of(out), torch.get_num_threads())


def _measure_triton(logits: Tensor, targets: Tensor, terms: Terms, whole: bool) -> Measured:
    return dispatch.part("triton_cross_entropy").measure(logits, targets, terms, whole)


def _differentiate_triton(*arguments: Any) -> None:
    dispatch.part("triton_cross_entropy").differentiate(*arguments)


def no_class(targets: Tensor, row: int, terms: Terms) -> IndexError:
    return IndexError(f"the target of row {row} is {int(targets[row])}, and there are {terms.vocabulary} classes: "
                      f"targets are from 0 to {terms.vocabulary - 1}, or ignore_index ({terms.ignore_index})")


# --- The oracle: eager torch ------------------------------------------------------------------------------------------

def wrong(targets: Tensor, terms: Terms) -> Tensor:
    """Which targets are no class and not ignored."""
    return (targets != terms.ignore_index) & ((targets < 0) | (targets >= terms.vocabulary))


def check_classes(targets: Tensor, terms: Terms) -> None:
    """Raise IndexError if a target in CPU memory is no class."""
    if targets.device.type == "cpu" and (bad := wrong(targets, terms)).any():
        raise no_class(targets, int(bad.nonzero()[0]), terms)


def _rows_and_targets(logits: Tensor, targets: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    rows = logits.reshape(-1, logits.shape[-1]) if logits.numel() else logits.new_zeros(targets.numel(), 0)
    return (rows if rows.dtype == torch.float64 else rows.float()), targets.reshape(-1).long()


def _measure_reference(logits: Tensor, targets: Tensor, terms: Terms, whole: bool) -> Measured:
    x, targets = _rows_and_targets(logits, targets, terms)
    check_classes(targets, terms)
    here = targets - terms.first
    inside = (here >= 0) & (here < x.shape[1]) & ~wrong(targets, terms)
    nan, none = x.new_full((), torch.nan), x.new_full((len(x), 1), -torch.inf)
    most = torch.cat([none, x], 1).amax(1)
    total = (x - finite(most)[:, None]).exp().sum(1)
    own = torch.cat([none, x], 1).gather(1, (torch.where(inside, here, -1) + 1)[:, None])[:, 0]
    shifted = (x - finite(most)[:, None]).sum(1) if terms.label_smoothing else torch.zeros_like(most)
    parts = torch.stack([most, total, torch.where(inside, own, nan), shifted, torch.full_like(most, x.shape[1])], 1)
    ignored = (targets == terms.ignore_index)[:, None]
    parts = torch.where(ignored, parts.new_tensor([0.0, 1.0, 0.0, 0.0, 0.0]), parts)
    return finish(parts, targets, terms) if whole else only(parts)


def finite(most: Tensor) -> Tensor:
    """The largest logits, and 0 for -inf: ``exp(-inf - 0)`` is 0."""
    return torch.where(most == -torch.inf, 0, most)


def combine(parts: Tensor) -> Tensor:
    """The parts of whole rows, (rows, 5), from those of their pieces, (pieces, rows, 5), added in order in float64.

    Example:
        >>> x = torch.randn(3, 8)
        >>> targets = torch.tensor([0, 7, 2])
        >>> pieces = [measure_part(x[:, a:b], targets, Terms(a, 8, -100, 0.1, 0.0)) for a, b in [(0, 5), (5, 8)]]
        >>> whole = measure(x, targets, Terms(0, 8, -100, 0.1, 0.0)).parts
        >>> torch.allclose(combine(torch.stack(pieces)), whole, atol=1e-5)
        True
    """
    pieces = parts.double()
    most = pieces[..., 0].amax(0)
    total = shifted = torch.zeros_like(most)
    own = torch.full_like(most, torch.nan)
    for piece in pieces:
        total = total + piece[:, 1] * (piece[:, 0] - finite(most)).exp()
        own = torch.where(own.isnan(), piece[:, 2], own)
        shifted = shifted + piece[:, 3] + piece[:, 4] * (finite(piece[:, 0]) - finite(most))
    return torch.stack([most, total, own, shifted, pieces[..., 4].sum(0)], 1).to(parts.dtype)


def finish(parts: Tensor, targets: Tensor, terms: Terms) -> Measured:
    """The losses, from the parts of whole rows."""
    dtype = torch.float64 if parts.dtype == torch.float64 else torch.float32
    most, total, own, shifted, _ = parts.double().unbind(1)
    counted = targets.reshape(-1) != terms.ignore_index
    tail, smoothing = total.log(), terms.label_smoothing
    losses = (1 - smoothing) * (most - own + tail)
    if smoothing:
        losses = losses + smoothing * (tail - shifted / terms.vocabulary)
    z = terms.z_loss * (most + tail).square() if terms.z_loss else torch.zeros_like(most)
    zero = most.new_zeros(())
    losses, z = (torch.where(counted, x, zero).to(dtype) for x in (losses, z))
    return Measured(parts, losses, z, losses.double().sum() + z.double().sum(), counted.sum(),
                    (counted & (own == most)).sum())


def _differentiate_reference(logits: Tensor, targets: Tensor, terms: Terms, parts: Tensor, scales: Tensor,
                             out: Tensor) -> None:
    x, targets = _rows_and_targets(logits, targets, terms)
    most, total = parts[:, 0].double(), parts[:, 1].double()
    scale = torch.where(wrong(targets, terms), torch.nan, scales.double())
    each = scale * (1 + 2 * terms.z_loss * (most + total.log()) if terms.z_loss else 1) / total
    found = (x - most.to(x.dtype)[:, None]).exp() * each.to(x.dtype)[:, None]
    if terms.label_smoothing:
        found = found - (scale * terms.label_smoothing / terms.vocabulary).to(x.dtype)[:, None]
    here = targets - terms.first
    at = ((here >= 0) & (here < x.shape[1]) & (targets != terms.ignore_index)).nonzero()[:, 0]
    found[at, here[at]] -= ((1 - terms.label_smoothing) * scale).to(x.dtype)[at]
    out.copy_(torch.where((targets == terms.ignore_index)[:, None], 0, found).reshape(logits.shape))


# By backend; `dispatch.choose_from` says what stands in for one that is not here.
MEASURE: dict[str, Callable[..., Any]] = {"triton": _measure_triton, "cpu": _measure_native,
                                          "reference": _measure_reference}
DIFFERENTIATE: dict[str, Callable[..., Any]] = {"triton": _differentiate_triton, "cpu": _differentiate_native,
                                                "reference": _differentiate_reference}
