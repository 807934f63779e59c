"""Products of matrices with themselves, which are symmetric: by torch, or by a kernel that computes half of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fasttrain.kernels import dispatch


def products(x: Tensor, backend: str | None = None) -> tuple[Callable[..., None], Callable[..., None]]:
    """The best `gram` and `polynomial` for a batch of matrices. Neither waits for the device or allocates.

    Arguments:
        x: contiguous, shape (batch, rows, columns).
        backend: a name from `fasttrain.kernels.dispatch`, or None to choose. On GPUs all but "reference" take Triton
            for 16-bit matrices of more than 64 rows and columns, multiples of 16; the others are torch's.

    Raises:
        RuntimeError: the backend that was asked for cannot run.

    Example:
        >>> import torch
        >>> products(torch.ones(1, 2, 3)) == (gram, polynomial)
        True
    """
    return dispatch.choose_from(PRODUCTS, dispatch.choose(x.device, backend), x.device)(x)


def gram(x: Tensor, out: Tensor) -> None:
    """out = X X^T for each matrix of a batch, X^T X for tall ones; by torch.

    Example:
        >>> import torch
        >>> out = torch.empty(1, 2, 2)
        >>> gram(torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]]), out)
        >>> out
        tensor([[[35., 44.],
                 [44., 56.]]])
    """
    torch.bmm(*((x.mT, x) if x.shape[1] > x.shape[2] else (x, x.mT)), out=out)


def polynomial(a: Tensor, b: float, c: float, out: Tensor) -> None:
    """out = b A + c A A for each matrix of a batch; A is symmetric, as `gram` leaves it; by torch.

    Example:
        >>> import torch
        >>> out = torch.empty(1, 2, 2)
        >>> polynomial(torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]), 10.0, 1.0, out)
        >>> out
        tensor([[[25., 14.],
                 [14., 25.]]])
    """
    torch.baddbmm(a, a, a, beta=b, alpha=c, out=out)


def _torchs(x: Tensor) -> tuple[Any, Any]:
    return gram, polynomial


def _tritons(x: Tensor) -> tuple[Any, Any]:
    from fasttrain.kernels import triton_symmetric

    return (triton_symmetric.gram, triton_symmetric.polynomial) if triton_symmetric.serves(x) else _torchs(x)


# By backend; `dispatch.choose_from` says what stands in for one that is not here.
PRODUCTS: dict[str, Callable[..., Any]] = {"triton": _tritons, "reference": _torchs}
