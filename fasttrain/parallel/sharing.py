"""Parameters and buffers made equal where they are to be: on a mesh with the first rank that holds the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fasttrain.dist.mesh import MEAN, Mesh
from fasttrain.dist.wire import Wire
from fasttrain.optim.local import local
from fasttrain.parallel.groups import Group, group_of
from fasttrain.parallel.over_axes import Reach


@torch.no_grad()
def broadcast(wire: Wire | None, tensors: Iterable[Tensor], source: int = 0) -> None:
    """Replace tensors, as far as they lie here, by those of a rank: one collective for each dtype."""
    if wire is None or wire.size == 1:
        return
    for group in by_dtype([local(tensor.detach()) for tensor in tensors]):
        flat = wire.broadcast_(torch.cat([tensor.reshape(-1) for tensor in group]), source)
        for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def share(reach: Reach, module: nn.Module, tied: Mapping[str, Sequence[int]]) -> None:
    """Make parameters and buffers of a module those of the first rank, or of the first that holds the same parts."""
    mesh = reach.mesh
    if mesh is None or reach.single:
        broadcast(reach.wire, [*module.parameters(), *module.buffers()])
        return
    found: dict[Group, list[Tensor]] = {}
    for name, p in module.named_parameters():
        found.setdefault(group_of(name, p, mesh, tied.get(name, ())), []).append(p)
    for group in sorted(found, key=lambda group: group.name):  # in one order on all ranks of a tie
        broadcast(along(mesh, group.copies), found[group])
        broadcast(reach.wires[group.name] if group.stages else along(mesh, group.axes), found[group])
    broadcast(of_buffers(reach), module.buffers())


def of_buffers(reach: Reach) -> Wire | None:
    """To the ranks whose buffers are to be equal: those that differ in the data they see."""
    return reach.wire if reach.mesh is None or reach.single else along(reach.mesh, MEAN)


def along(mesh: Mesh, axes: tuple[str, ...]) -> Wire | None:
    """The wire along some axes; None where there is one rank."""
    return mesh.wire(*axes) if mesh.count(*axes) > 1 else None


def by_dtype(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in groups of one dtype and device, in a fixed order."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    yield from groups.values()
