"""The copies of parameters that several stages have: made equal, and their gradients added up."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fasttrain.dist.mesh import AXES, Mesh
from fasttrain.dist.wire import Wire
from fasttrain.optim.local import local
from fasttrain.parallel import ties
from fasttrain.parallel.pipeline.held import Held


class Copies:
    """Those of one rank, and wires to the ranks that hold the same copy.

    Arguments:
        model: what the rank holds.
        held: how.
        mesh: by which it was split.

    Raises:
        ValueError: only some of the stages that have a parameter train it.
    """

    def __init__(self, model: nn.Module, held: Held, mesh: Mesh):
        ties.trained(model, None, mesh)
        self.model, self.held = model, held
        self.names: dict[tuple[int, ...], list[str]] = {}
        for tie in held.ties:
            if tie.here is not None:
                self.names.setdefault(tie.ranks, []).append(tie.here)
        across = tuple(mesh.coordinates[axis] for axis in AXES[1:])
        self.wires = {ranks: Wire(mesh.device, mesh.timeout_s,
                                  [int(mesh.torch.mesh[(rank, *across)]) for rank in ranks], mesh.wire().watch)
                      for ranks in sorted(self.names)}  # in an order that all ranks share

    def _params(self, ranks: tuple[int, ...]) -> list[Tensor]:
        return [self.model.get_parameter(name) for name in self.names[ranks]]

    @torch.no_grad()
    def make_equal(self) -> None:
        """Every copy becomes that of the first stage that has one."""
        for ranks, wire in self.wires.items():
            for p in self._params(ranks):
                part = local(p.detach())
                if not part.is_meta:
                    part.copy_(wire.broadcast_(part.clone(memory_format=torch.contiguous_format)))

    @torch.no_grad()
    def add(self) -> None:
        """Every copy gets the sum of all gradients; one that no stage has used keeps None."""
        for ranks, wire in self.wires.items():
            params = [p for p in self._params(ranks) if p.requires_grad]
            used = wire.sum_(torch.tensor([float(p.grad is not None) for p in params], device=wire.device)).tolist()
            for p, count in zip(params, used, strict=True):
                if count:
                    if p.grad is None:
                        p.grad = torch.zeros_like(p)
                    part = local(p.grad)
                    part.copy_(wire.sum_(part.clone(memory_format=torch.contiguous_format)))
