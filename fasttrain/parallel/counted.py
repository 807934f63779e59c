"""The sum of squares of gradients over all axes of a mesh, of which every rank adds what no other counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fasttrain.dist.mesh import Mesh
from fasttrain.kernels import norm
from fasttrain.optim import wider
from fasttrain.parallel import held


class Counted:
    """What makes the norm of these parameters that of the whole model: see `fasttrain.optim.wider`.

    Arguments:
        mesh: over which the model is divided.
        named: this rank's parameters, or its parts of them.
        here: whether this stage counts the parameter of a name, which others may have too.
    """

    def __init__(self, mesh: Mesh, named: Sequence[tuple[str, Tensor]], here: Callable[[str], bool]):
        self.wire = mesh.wire()
        self._counts = {id(p): held.counts(mesh, name, p) and here(name) for name, p in named}
        self._mask: tuple[tuple[int, ...], Tensor] | None = None  # of these parameters, which count here
        wider.declare([p for _, p in named], self)

    def __call__(self, params: Sequence[Tensor], squares: Tensor, bad: Tensor) -> tuple[Tensor, Tensor]:
        """One collective of two numbers over all ranks, the same bits on each."""
        ids = tuple(map(id, params))
        if self._mask is None or self._mask[0] != ids:
            counts = torch.tensor([self._counts[one] for one in ids], dtype=torch.bool, device=squares.device)
            self._mask = ids, counts
        total = norm.total(torch.where(self._mask[1], squares, 0.0)) if len(squares) else squares.sum()
        total, found = self.wire.sum_(torch.stack([total, bad.to(total)]).to(self.wire.device))
        return total, found != 0
