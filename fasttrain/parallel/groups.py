"""Over which ranks the gradient of a parameter is added up, and who else holds the same.

One rule for every parameter on a `Mesh`: its gradient is the sum over its group of the ranks' own gradients, divided by
`mesh.terms`, of how many ranks the loss is a mean.

=================================================== ==================================================================
parameter                                           group: ranks that differ along
=================================================== ==================================================================
plain, or a DTensor cut over tensor                 data, shard, expert and context (`MEAN`)
declared to get addends (a norm's weight under      these and tensor
sequence parallelism)
an expert's: a DTensor cut over expert              data, shard and context
tied across stages of the pipeline                  the same as without the tie, and these stages
=================================================== ==================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fasttrain.dist.mesh import AXES, MEAN, Mesh
from fasttrain.optim.local import cuts, is_dtensor
from fasttrain.parallel.tensor.partial import declared

PLAIN = "data"  # the group of most parameters
CUTTING = ("expert", "tensor")  # axes over which a parameter may be divided


@dataclass(frozen=True)
class Group:
    """Parameters whose gradients travel together.

    Attributes:
        name: as a layout shows it.
        axes: of more than one rank, along which its ranks differ.
        stages: of the pipeline, on all of which the parameters lie; none: on this rank's only.
        copies: axes along which other ranks hold the same, and come to the same gradient by themselves.
        adds: gradients are addends over the tensor axis, though every rank of that holds the parameter whole.
    """

    name: str = PLAIN
    axes: tuple[str, ...] = ()
    stages: tuple[int, ...] = ()
    copies: tuple[str, ...] = ()
    adds: bool = False

    def ranks(self, mesh: Mesh) -> list[int]:
        """Its ranks, ascending."""
        if not self.stages:
            return mesh.ranks(*self.axes)
        index = tuple(slice(None) if axis in self.axes else mesh.coordinates[axis] for axis in AXES[1:])
        return sorted(rank for stage in self.stages for rank in mesh.torch.mesh[(stage, *index)].flatten().tolist())

    def counts(self, mesh: Mesh) -> bool:
        """Whether this rank's part of the gradients is to be added up with those of all ranks, and not a copy's."""
        return not any(mesh.coordinates[axis] for axis in self.copies)


def group_of(name: str, p: Any, mesh: Mesh, stages: Sequence[int] = ()) -> Group:
    """The group of a parameter.

    Arguments:
        name: for errors.
        stages: of the pipeline, if the parameter is tied across several.

    Raises:
        ValueError: it is divided in a way that no group serves, or over other ranks than those of the mesh.
    """
    divided = divided_over(name, p, mesh)
    axes = [axis for axis in MEAN if axis not in divided and mesh.sizes[axis] > 1]
    wide = mesh.sizes["tensor"] > 1 and "tensor" not in divided
    adds = wide and declared(p)
    words = ["without expert"] * ("expert" in divided) + ["and tensor"] * adds
    if adds:
        axes.append("tensor")
    stages = check_stages(name, stages, mesh)
    if stages:
        words.append(f"and stages {', '.join(map(str, stages))}")
    copies = ("tensor",) if wide and not adds else ()
    words += [f"copied over {axis}" for axis in copies]
    return Group(" ".join([PLAIN, ", ".join(words)]).rstrip(), tuple(axes), stages, copies, adds)


def check_stages(name: str, stages: Sequence[int], mesh: Mesh) -> tuple[int, ...]:
    """The stages of a tie in ascending order; none if there is one alone."""
    found, count = tuple(sorted(set(stages))), mesh.sizes["pipeline"]
    if not found:
        return ()
    if not (all(isinstance(stage, int) and 0 <= stage < count for stage in found)
            and mesh.coordinates["pipeline"] in found):
        raise ValueError(f"{name} is tied across stages {list(stages)}: give numbers of the {count} stages of the "
                         f"pipeline, this one ({mesh.coordinates['pipeline']}) among them")
    return found if len(found) > 1 else ()


def divided_over(name: str, p: Any, mesh: Mesh) -> tuple[str, ...]:
    """The axes of more than one rank along which other ranks hold other parts of a parameter."""
    if not is_dtensor(p):
        return ()
    names = p.device_mesh.mesh_dim_names or ()
    for place, (axis, placement) in enumerate(zip(names, p.placements, strict=False)):
        if p.device_mesh.size(place) == 1:
            continue
        if axis not in CUTTING:
            raise ValueError(f"{name} lies on the axis {axis!r} of its mesh: buckets take parameters that are divided "
                             f"over {' and '.join(CUTTING)} only; those of fully_shard reduce their gradients "
                             "themselves (fasttrain.parallel.shard)")
        if placement.is_partial():
            raise ValueError(f"{name} is placed {p.placements}: each rank holds an addend of it, and a step cannot "
                             "change a sum; redistribute it to Replicate or Shard")
        if p.device_mesh[axis].mesh.flatten().tolist() != mesh[axis].mesh.flatten().tolist():
            raise ValueError(f"{name} lies on ranks {p.device_mesh[axis].mesh.flatten().tolist()} along {axis!r}, and "
                             f"the mesh has {mesh[axis].mesh.flatten().tolist()} there: cut it over mesh[{axis!r}]")
    if not names:
        raise ValueError(f"{name} is a DTensor on a mesh whose dimensions have no names: cut it over mesh['tensor'] or "
                         "mesh['expert'] of the Mesh")
    return tuple(names[place] for place, _ in cuts(p) if p.device_mesh.size(place) > 1)


def evenly_cut(p: Any) -> bool:
    """Whether all ranks hold parts of one size."""
    sizes = list(p.shape) if is_dtensor(p) else []
    for dim, placement in cuts(p):
        pieces = p.device_mesh.size(dim) * getattr(placement, "split_factor", 1)
        if sizes[placement.dim] % pieces:
            return False
        sizes[placement.dim] //= p.device_mesh.size(dim)
    return True
