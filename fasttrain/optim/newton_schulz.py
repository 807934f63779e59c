"""Newton-Schulz iteration: the orthogonal factor of many matrices at once, by matrix products alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fasttrain.kernels import symmetric
from fasttrain.optim.workspace import Workspace


def orthogonalize(x: Tensor, coefficients: Sequence[float], steps: int, eps: float, workspace: Workspace,
                  backend: str | None = None) -> Tensor:
    """Replace each matrix by its orthogonal factor, roughly: singular values come near 1.

    A matrix is divided by its Frobenius norm, and then each step takes X to a X + (b A + c A^2) X with A = X X^T. Tall
    matrices are multiplied from the right, with A = X^T X, which is the same and keeps the products small.

    Arguments:
        x: matrices, contiguous, shape (batch, rows, columns), usually bfloat16; overwritten.
        coefficients: a, b and c.
        steps: how many.
        eps: the least norm to divide by.
        workspace: where the products are kept; nothing is allocated once it is large enough.
        backend: what computes A and b A + c A^2: see `fasttrain.kernels.symmetric.products`.

    Returns:
        The result, of x's shape and dtype; in x's memory or in the workspace's, until the next call.

    Example:
        >>> import torch
        >>> x = torch.diag_embed(torch.tensor([[3.0, 1.0]]))
        >>> orthogonalize(x, (1.5, -0.5, 0.0), 12, 1e-7, Workspace()).round(decimals=4)
        tensor([[[1., 0.],
                 [0., 1.]]])

    Reference: Jordan et al., Muon: an optimizer for hidden layers in neural networks (2024), "Newton-Schulz iteration".
    """
    a, b, c = coefficients
    batch, rows, columns = x.shape
    side = min(rows, columns)
    gram = workspace.take("gram", (batch, side, side), x.dtype, x.device)
    polynomial = workspace.take("polynomial", (batch, side, side), x.dtype, x.device)
    other = workspace.take("other", x.shape, x.dtype, x.device)
    norm = workspace.take("norm", (batch, 1, 1), x.dtype, x.device)
    torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, out=norm)
    x.div_(norm.clamp_(min=eps))
    multiply, combine = symmetric.products(x, backend)
    for _ in range(steps):
        multiply(x, gram)
        combine(gram, b, c, polynomial)
        torch.baddbmm(x, *((x, polynomial) if rows > columns else (polynomial, x)), beta=a, out=other)
        x, other = other, x
    return x
