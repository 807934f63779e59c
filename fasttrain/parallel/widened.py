"""The norm of a model of which this rank has a part: what each rank counts, added up over all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fasttrain.dist.mesh import Mesh
from fasttrain.dist.wire import Wire
from fasttrain.kernels import norm
from fasttrain.optim import wider
from fasttrain.parallel import held


class Widened:
    """From the squares of this rank's parts of gradients to those of the whole model; see `fasttrain.optim.wider`.

    Arguments:
        everyone: to all ranks.
        counted: by the id of a parameter, whether this rank is the one that counts its part.
    """

    def __init__(self, everyone: Wire, counted: Mapping[int, bool]):
        self.everyone, self.counted = everyone, counted
        self._mask: tuple[tuple[int, ...], Tensor] | None = None

    def __call__(self, params: Sequence[Tensor], squares: Tensor, bad: Tensor) -> tuple[Tensor, Tensor]:
        """Each rank adds what no other counts: one collective of two numbers over all ranks."""
        ids = tuple(map(id, params))
        if self._mask is None or self._mask[0] != ids:
            self._mask = ids, torch.tensor([self.counted[one] for one in ids], dtype=torch.bool, device=squares.device)
        total = norm.total(torch.where(self._mask[1], squares, 0.0)) if len(squares) else squares.sum()
        both = torch.stack([total, bad.to(total)]).to(self.everyone.device)
        total, bad = self.everyone.sum_(both)
        return total, bad != 0


def widen(mesh: Mesh, everyone: Wire, named: Sequence[tuple[str, Tensor]],
          tied: Mapping[str, Sequence[int]]) -> None:
    """Let the norm of these parameters be that of the whole model, each counted once.

    Arguments:
        named: frozen ones too: a stage may have no other.
        tied: of those that lie on several stages, the stages: the first one counts them.
    """
    stage = mesh.coordinates["pipeline"]
    counted = {id(p): held.counts(mesh, name, p) and min(tied.get(name) or (stage,)) == stage for name, p in named}
    wider.declare([p for _, p in named], Widened(everyone, counted))
