"""Which ranks of a mesh hold the same part of a tensor, and which one of them counts it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fasttrain.dist.mesh import AXES, Mesh
from fasttrain.optim.local import cuts, local


def cut(name: str, tensor: Any) -> tuple[str, ...]:
    """The axes along which ranks hold different parts of a tensor, or of a parameter that is one; none of a plain one.

    Raises:
        ValueError: it is cut over dimensions that are no axes of a `Mesh`.
    """
    found = []
    for dim, _ in cuts(tensor):
        names = tensor.device_mesh.mesh_dim_names
        if tensor.device_mesh.size(dim) == 1:
            continue
        if names is None or names[dim] not in AXES:
            raise ValueError(f"{name} is cut over {tensor.device_mesh}, whose dimensions are no axes of the mesh "
                             f"({', '.join(AXES)}): distribute it over a slice of the mesh, as mesh['tensor']")
        found.append(names[dim])
    return tuple(found)


def copies(mesh: Mesh, name: str, tensor: Any) -> tuple[str, ...]:
    """The axes along which ranks hold the same part. Stages hold different parameters, and are none of them."""
    apart = cut(name, tensor)
    return tuple(axis for axis in AXES if axis != "pipeline" and axis not in apart)


def counts(mesh: Mesh, name: str, tensor: Any) -> bool:
    """Whether this rank is the one that counts its part, of all that hold it."""
    return all(mesh.coordinates[axis] == 0 for axis in copies(mesh, name, tensor))


@torch.no_grad()
def make_equal(mesh: Mesh, named: Sequence[tuple[str, Any]], axes: Sequence[str] = AXES) -> None:
    """Give all ranks that hold the same part of a tensor what the first of them has; a collective of each stage.

    Arguments:
        axes: along which ranks are made equal at most.
    """
    for name, tensor in named:
        among = [axis for axis in copies(mesh, name, tensor) if axis in axes and mesh.sizes[axis] > 1]
        mine = local(tensor.detach())
        if not among or mine.is_meta:
            continue
        wire = mesh.wire(*among)
        if mine.is_contiguous():
            wire.broadcast_(mine)
        else:
            mine.copy_(wire.broadcast_(mine.contiguous()))
