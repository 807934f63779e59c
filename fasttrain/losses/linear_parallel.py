"""A linear layer and its cross-entropy, in chunks of rows, of a weight whose classes are divided over ranks.

For each chunk every rank makes the logits of its own classes, measures them, gathers the five numbers of a row that
all ranks have found (20 bytes a row and rank; 40 of float64), and turns its logits into their derivative where they
lie. The alternative, one gather for all chunks, would make all logits twice: a third more arithmetic. The derivative by
hidden is an addend on every rank. Where all have all rows it is summed once, behind the last chunk; where each has a
part of the rows (sequence parallel), a chunk is as many rows of every rank, gathered before and scattered behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttrain.kernels import cross_entropy as kernel
from fasttrain.kernels.cross_entropy import Terms
from fasttrain.losses.linear_ops import Sums
from fasttrain.losses.ops import no_second

if TYPE_CHECKING:
    from fasttrain.dist.along import Along


class How(NamedTuple):
    """What is the same on every rank.

    Attributes:
        dim: that of the leading dimensions of hidden which is cut over the ranks; None: every rank has all rows.
        chunk: rows at a time, on all ranks together.
        needed: whether the derivatives by hidden, weight and bias are.
    """

    along: Along
    dim: int | None
    chunk: int
    terms: Terms
    reduction: str
    needed: list[bool]


class Rows:
    """Rows in the order of chunks: for each of the `parts` that have them, (parts, longest), filled up at the end.

    Arguments:
        shape: of what has one number for each row.
    """

    def __init__(self, how: How, shape: torch.Size):
        self.dim, self.shape = how.dim, shape
        self.parts = 1 if how.dim is None else how.along.size
        self.each = None if how.dim is None else -(-shape[how.dim] // self.parts)
        counts = [piece.numel() for piece in self.pieces(torch.empty(shape, device="meta"))]
        self.counts, self.longest = counts, counts[0]
        self.step = max(1, -(-how.chunk // self.parts))

    def pieces(self, tensor: Tensor) -> list[Tensor]:
        """What each part has, by DTensor's rule."""
        if self.dim is None or self.each is None:
            return [tensor]
        size = tensor.shape[self.dim]
        cuts = [min(self.each * part, size) for part in range(self.parts + 1)]
        return [tensor.narrow(self.dim, cut, end - cut) for cut, end in pairwise(cuts)]

    def ordered(self, tensor: Tensor, filling: float) -> Tensor:
        """A number for each row, (parts, longest)."""
        flat = [F.pad(piece.reshape(-1), (0, self.longest - piece.numel()), value=filling)
                for piece in self.pieces(tensor)]
        return torch.stack(flat) if len(flat) > 1 else flat[0][None]

    def restored(self, tensor: Tensor) -> Tensor:
        """The opposite of `ordered`."""
        pieces = self.pieces(torch.empty(self.shape, device="meta"))
        found = [row[:count].view(piece.shape) for row, count, piece in zip(tensor, self.counts, pieces, strict=True)]
        return torch.cat(found, self.dim or 0) if len(found) > 1 else found[0]

    def __iter__(self) -> Iterator[slice]:
        """The rows of each part that make a chunk."""
        for begin in range(0, self.longest, self.step):
            yield slice(begin, min(begin + self.step, self.longest))


class Hidden:
    """This rank's rows of hidden: gathered for a chunk where ranks have different ones, and their derivative."""

    def __init__(self, how: How, rows: Rows, hidden: Tensor, needed: bool):
        self.along, self.parts, self.shape = how.along, rows.parts, hidden.shape
        self.flat = hidden.reshape(-1, hidden.shape[-1])
        self.grad = hidden.new_empty(self.flat.shape if needed else (0,))

    def of(self, at: slice) -> Tensor:
        own = self.flat[at]
        if self.parts == 1:
            return own
        gathered = self.along.gather(F.pad(own, (0, 0, 0, at.stop - at.start - len(own))))
        return gathered.view(-1, self.flat.shape[1])

    def add(self, at: slice, by_logits: Tensor, weight: Tensor) -> None:
        """The derivative by the rows, or this rank's addend."""
        if self.parts == 1:
            torch.mm(by_logits, weight, out=self.grad[at])
            return
        own, place = torch.mm(by_logits, weight).view(self.parts, -1, weight.shape[1]), self.grad[at]
        place.copy_(self.along.sum_of_own(own)[: len(place)])

    def ended(self) -> Tensor:
        if self.parts == 1:
            self.along.sum_(self.grad)
        return self.grad.view(self.shape)


def chunks(rows: Rows, hidden: Hidden, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(which rows of each part, these rows of hidden, their logits), one after the other, all logits in one buffer."""
    buffer = weight.new_empty(rows.parts * min(rows.step, rows.longest), len(weight))
    for at in rows:
        some = hidden.of(at)
        logits = buffer[: len(some)]
        if bias is None:
            torch.mm(some, weight.t(), out=logits)
        else:
            torch.addmm(bias, some, weight.t(), out=logits)
        yield at, some, logits


class Grads:
    """The derivatives by hidden, weight and bias, as chunks are added."""

    def __init__(self, how: How, rows: Rows, hidden: Tensor, weight: Tensor, needed: list[bool]):
        self.how, self.needed, self.of = how, needed, weight
        self.source = Hidden(how, rows, hidden, needed[0])
        self.sums = Sums(hidden, weight, [False, *needed[1:]], rows.longest > rows.step)

    def add(self, at: slice, some: Tensor, logits: Tensor, target: Tensor, parts: Tensor, scale: Tensor) -> None:
        """Those of a chunk, whose logits are overwritten by their own."""
        if any(self.needed):
            kernel.differentiate(logits, target, self.how.terms, parts, scale, logits)
            self.sums.add(slice(None), logits, some, self.of)
        if self.needed[0]:
            self.source.add(at, logits, self.of)

    def ended(self) -> list[Tensor | None]:
        _, by_weight, by_bias = self.sums.ended(self.source.shape)
        return [self.source.ended() if self.needed[0] else None, by_weight if self.needed[1] else None,
                by_bias if self.needed[2] else None]


class LinearCrossEntropy(torch.autograd.Function):
    """The loss; derivatives are made in forward, or, where every row has a loss of its own, in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, how: How) -> Tensor:
        ctx.how, one = how, how.reduction != "none"
        kernel.check_classes(targets.reshape(-1), how.terms)
        rows = Rows(how, targets.shape)
        classes = rows.ordered(targets, how.terms.ignore_index)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        count = (targets != how.terms.ignore_index).sum() if how.reduction == "mean" else targets.new_ones(())
        scale, total = torch.ones((), dtype=exact, device=weight.device) / count, weight.new_zeros(()).double()
        kept = hidden.new_empty(*classes.shape, kernel.PARTS + 1, dtype=exact) if not one else total
        grads = Grads(how, rows, hidden, weight, how.needed if one else [False] * 3)
        with torch.autocast(hidden.device.type, enabled=False):
            for at, some, logits in chunks(rows, grads.source, weight, bias):
                target = classes[:, at].reshape(-1)
                own = kernel.measure_part(logits, target, how.terms)
                found = kernel.finish(kernel.combine(how.along.gather(own)), target, how.terms)
                if one:
                    total += found.total
                    grads.add(at, some, logits, target, found.parts, scale)
                else:
                    row = torch.cat([found.parts, (found.losses + found.z)[:, None]], 1)
                    kept[:, at] = row.view(rows.parts, -1, row.shape[1])
        if one:
            ctx.save_for_backward(*grads.ended())
            return (total / count).to(exact)
        ctx.save_for_backward(hidden, weight, bias, classes, kept)
        return rows.restored(kept[..., -1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            no_second()
        how = ctx.how
        if how.reduction != "none":
            return *(None if each is None else each * grad.to(each.dtype) for each in ctx.saved_tensors), None, None
        hidden, weight, bias, classes, kept = ctx.saved_tensors
        rows = Rows(how, grad.shape)
        scales = rows.ordered(grad.to(kept.dtype), 0.0)
        grads = Grads(how, rows, hidden, weight, how.needed)
        with torch.autocast(hidden.device.type, enabled=False):
            for at, some, logits in chunks(rows, grads.source, weight, bias):
                parts = kept[:, at, : kernel.PARTS].reshape(-1, kernel.PARTS).contiguous()
                grads.add(at, some, logits, classes[:, at].reshape(-1), parts, scales[:, at].reshape(-1))
        return *grads.ended(), None, None
