"""The matrices of all experts, one tensor for each layer of theirs, divided over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from fasttrain.dist.mesh import Mesh
from fasttrain.parallel.building.rules import Normal, Rule
from fasttrain.parallel.experts.grouped import grouped

Activation = Callable[[Tensor], Tensor]


def squared_relu(x: Tensor) -> Tensor:
    """``max(x, 0)^2``: So et al., Primer, arXiv 2109.08668."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Activation] = {"squared_relu": squared_relu, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}


class Experts(nn.Module):
    """Feed-forward layers, of which each row passes through that of its expert, without biases.

    Arguments:
        width, hidden, experts: features of a row, features within, and how many experts there are on all ranks.
        activation: "squared_relu", "relu", "gelu", "silu" or a function; None: "silu" if gated, else "squared_relu".
        gated: multiply what goes up by the activation of a gate, in place of the activation of what goes up.
        mesh: divides the experts along "expert", and the features within along "tensor".

    Attributes:
        up, gate: (experts, hidden, width); gate is None if there is none.
        down: (experts, width, hidden). On a mesh that divides them they are DTensors, placed Shard(0) over "expert",
            and over "tensor" Shard(1), `down` Shard(2).

    Raises:
        ValueError: an axis does not divide what it is to divide.
    """

    gate: nn.Parameter | None
    divides_itself = True  # `tensor_parallel` leaves its parameters as they are

    def __init__(self, width: int, hidden: int, experts: int, *, activation: str | Activation | None = None,
                 gated: bool = False, mesh: Mesh | None = None, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None):
        super().__init__()
        for name, number in (("width", width), ("hidden", hidden), ("experts", experts)):
            if number < 1:
                raise ValueError(f"{name}={number}: give 1 or more")
        activation = activation or ("silu" if gated else "squared_relu")
        if isinstance(activation, str) and activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r}: give one of {', '.join(ACTIVATIONS)}, or a function")
        self.activation = ACTIVATIONS[activation] if isinstance(activation, str) else activation
        self.shape = (experts, hidden, width)
        for number, axis, what in ((experts, "expert", "experts"), (hidden, "tensor", "features within an expert")):
            if mesh is not None and number % mesh.sizes[axis]:
                raise ValueError(f"{number} {what} do not divide over the {mesh.sizes[axis]} ranks of the mesh's axis "
                                 f"{axis!r}: give a multiple of {mesh.sizes[axis]}, or a mesh with {axis}= a divisor "
                                 f"of {number}")

        def made(rows: int, columns: int, cut: int) -> nn.Parameter:
            return nn.Parameter(placed((experts, rows, columns), cut, mesh, device, dtype))

        self.up = made(hidden, width, 1)
        if gated:
            self.gate = made(hidden, width, 1)
        else:
            self.register_parameter("gate", None)
        self.down = made(width, hidden, 2)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all matrices, of standard deviation ``1 / sqrt(columns)``.

        Every rank draws those of all experts, one at a time, and keeps its part: they do not depend on the mesh.
        """
        for parameter in (self.up, self.gate, self.down):
            if parameter is None or parameter.is_meta:
                continue
            whole = local(parameter).new_empty(parameter.shape[1:])
            parts = [slice(first, first + size) for first, size in offsets(parameter)]
            for expert in range(parameter.shape[0]):
                nn.init.normal_(whole, std=1 / math.sqrt(parameter.shape[2]))
                if parts[0].start <= expert < parts[0].stop:
                    local(parameter)[expert - parts[0].start] = whole[parts[1], parts[2]]

    def initial(self) -> dict[str, Rule]:
        """The same distributions, for `fasttrain.parallel.building.materialize`."""
        return {name: Normal(1 / math.sqrt(parameter.shape[2])) for name, parameter in self.named_parameters()}

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Rows (M, width) in the order of the experts of this rank, which have ``counts[e]`` of them each.

        Where "tensor" divides the features within, the result is this rank's term of a sum.
        """
        return self._through(rows, lambda x, weight: grouped(x, weight, counts))

    def batched(self, rows: Tensor) -> Tensor:
        """Rows (experts of this rank, S, width), as many of each expert."""
        return self._through(rows, lambda x, weight: torch.bmm(x, weight.transpose(1, 2)))

    def imagined(self, rows: Tensor) -> Tensor:
        """Rows (M, width) on the meta device, which have no experts: as many operations as with some."""
        return self._layers(rows, lambda x, weight: torch.mm(x, weight[0].t()))

    def _through(self, rows: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        kind = rows.device.type
        if not torch.is_autocast_enabled(kind):
            return self._layers(rows, multiply)
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return self._layers(rows.to(dtype), lambda x, weight: multiply(x, weight.to(dtype)))

    def _layers(self, rows: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        up = multiply(rows, local(self.up))
        if self.gate is None:
            return multiply(self.activation(up), local(self.down))
        return multiply(self.activation(multiply(rows, local(self.gate))) * up, local(self.down))

    def extra_repr(self) -> str:
        experts, hidden, width = self.shape
        name = getattr(self.activation, "__name__", self.activation)
        return f"{width}, {hidden}, experts={experts}, activation={name}, gated={self.gate is not None}"


def placed(shape: tuple[int, int, int], cut: int, mesh: Mesh | None, device: torch.device | str | None,
           dtype: torch.dtype | None) -> Tensor:
    """An empty tensor, or the part of one that this rank has: of dimension 0 over "expert", of `cut` over "tensor"."""
    cuts = {"expert": 0, "tensor": cut}
    axes = [] if mesh is None else [axis for axis in cuts if mesh.sizes[axis] > 1]
    if mesh is None or not axes:
        return torch.empty(shape, device=device, dtype=dtype)
    part = list(shape)
    for axis in axes:
        part[cuts[axis]] //= mesh.sizes[axis]
    placements: list[Placement] = [Shard(cuts[axis]) for axis in axes]
    own = torch.empty(part, device=device, dtype=dtype)
    return DTensor.from_local(own, mesh[tuple(axes)], placements, run_check=False)


def local(parameter: Tensor) -> Tensor:
    """The part of this rank, whose derivative is placed as it is."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def offsets(parameter: Tensor) -> list[tuple[int, int]]:
    """For each dimension, where this rank's part begins in the whole, and its length."""
    found = [(0, size) for size in parameter.shape]
    if isinstance(parameter, DTensor):
        where = parameter.device_mesh.get_coordinate()
        assert where is not None
        for dimension, (placement, index) in enumerate(zip(parameter.placements, where, strict=True)):
            if isinstance(placement, Replicate):
                continue
            assert isinstance(placement, Shard)
            first, size = found[placement.dim]
            size //= parameter.device_mesh.size(dimension)
            found[placement.dim] = (first + index * size, size)
    return found
