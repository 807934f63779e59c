"""Products of rows with the matrix of their expert, for rows that lie in the order of experts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def grouped(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """``rows[i] @ weight[e].T`` for the expert e of each row: (M, N) from (M, K) and (experts, N, K).

    The derivative by the matrix of an expert without rows is zero.

    Arguments:
        counts: (experts,) int64, how many rows each expert has; their sum is M.

    Example:
        >>> rows, weight = torch.ones(3, 2), torch.stack([torch.eye(2), 2 * torch.eye(2)])
        >>> grouped(rows, weight, torch.tensor([1, 2]))[:, 0]
        tensor([1., 2., 2.])
    """
    return _Grouped.apply(rows, weight, counts)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, counts)
        return _rows(rows, weight.transpose(1, 2), counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, counts = ctx.saved_tensors
        grad = grad.contiguous()
        by_rows = _rows(grad, weight, counts) if ctx.needs_input_grad[0] else None
        by_weight = _matrices(grad, rows, counts) if ctx.needs_input_grad[1] else None
        return by_rows, by_weight, None


def in_one_call(*tensors: Tensor) -> bool:
    """Whether torch multiplies all groups in one kernel, and the host need not know how large they are.

    So it is for bfloat16 on GPUs, whose kernels take rows of a multiple of 16 bytes, and one row at least.
    """
    return all(t.device.type == "cuda" and t.dtype == torch.bfloat16 and len(t) > 0 and t.data_ptr() % 16 == 0
               and all(size * t.itemsize % 16 == 0 for size in t.shape[1:]) for t in tensors)


def _rows(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """``rows[i] @ matrices[e]``, matrices of shape (experts, K, N)."""
    if in_one_call(rows, matrices):
        return _rows_in_one(rows, matrices, counts)
    out = rows.new_empty(len(rows), matrices.shape[2])
    for part, matrix, into in zip(rows.split(counts.tolist()), matrices, out.split(counts.tolist()), strict=True):
        torch.mm(part, matrix, out=into)
    return out


def _matrices(left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    """``left[e].T @ right[e]`` for the rows of each expert: (experts, N, K) from (M, N) and (M, K)."""
    if in_one_call(left, right):
        return _matrices_in_one(left, right, counts)
    out = left.new_empty(len(counts), left.shape[1], right.shape[1])
    for a, b, into in zip(left.split(counts.tolist()), right.split(counts.tolist()), out, strict=True):
        torch.mm(a.t(), b, out=into)  # of no rows: zero
    return out


def _rows_in_one(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    return F.grouped_mm(rows, matrices, offs=_ends(counts))


def _matrices_in_one(left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    found = F.grouped_mm(left.t(), right, offs=_ends(counts))
    # On some GPUs it leaves what was in memory for groups of no rows: github.com/pytorch/pytorch/issues/172439.
    return found.masked_fill_((counts == 0)[:, None, None], 0)


def _ends(counts: Tensor) -> Tensor:
    return counts.cumsum(0).to(torch.int32)
