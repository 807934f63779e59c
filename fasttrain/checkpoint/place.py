"""Where a process stands among those that save and load together, and who of them holds the same as it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fasttrain.checkpoint.parts import Among
from fasttrain.dist.mesh import AXES, Mesh
from fasttrain.dist.wire import Wire


@dataclass(frozen=True)
class OnMesh(Among):
    """The ranks of a `Mesh` that differ from this one along some axes only, and hold the same plain tensors.

    Of what is cut along one of these axes, those hold the same part that differ along the others: every data-parallel
    copy of a tensor-parallel shard, though its DeviceMesh knows of none.
    """

    mesh: Any = field(default=None, compare=False, repr=False)
    axes: tuple[str, ...] = ()
    _known: dict[Any, Among] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def along(cls, mesh: Mesh, axes: Sequence[str]) -> OnMesh:
        """Those along these axes."""
        long = tuple(axis for axis in axes if mesh.sizes[axis] > 1)
        return cls(mesh.index(*long), mesh.count(*long), ("axes", long), mesh, long)

    def copies(self, tensor: Any) -> Among:
        """The ranks that hold the same part of a DTensor as this one.

        Raises:
            ValueError: it is cut over ranks that are not those along some axes.
        """
        device_mesh = tensor.device_mesh
        cut = tuple(dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate())
        known = (device_mesh, cut)
        if known not in self._known:
            here = device_mesh.get_coordinate()
            lines = [device_mesh.mesh[tuple(slice(None) if dim == other else at for other, at in enumerate(here))]
                     for dim in cut]
            self._known[known] = self._beyond([line.tolist() for line in lines])
        return self._known[known]

    def beyond(self, ranks: Sequence[int]) -> Among:
        """The ranks that hold the same as this one of what is divided over some ranks, itself among them.

        Raises:
            ValueError: they are not those along some axes.
        """
        return self._beyond([ranks])

    def _beyond(self, lines: Sequence[Sequence[int]]) -> Among:
        cut = {axis for line in lines for axis in axes_of(self.mesh, line)}
        return OnMesh.along(self.mesh, [axis for axis in self.axes if axis not in cut])


def axes_of(mesh: Mesh, ranks: Sequence[int]) -> tuple[str, ...]:
    """The axes along which some ranks differ, this one among them.

    Raises:
        ValueError: they are not all the ranks that differ along some axes only.
    """
    others = set(ranks) - {mesh.rank}
    found = tuple(axis for axis in AXES if others & set(mesh.ranks(axis)))
    if sorted(ranks) != mesh.ranks(*found):
        raise ValueError(f"it is cut over the ranks {sorted(ranks)}, which are not those along some axes of {mesh!r}: "
                         "so nobody knows who else holds the same; cut it over slices of this mesh (mesh['tensor'])")
    return found


class Place:
    """A process among those that save and load together.

    Arguments:
        wire: to the others, which all hold the same plain tensors; or
        mesh: of the training. Plain tensors are held by the ranks of this one's pipeline stage, and by no others.
            Neither: there is one process.

    Attributes:
        rank, size, wire: of all.
        everyone: all, as those who hold the same.
        stage: those who hold the same plain tensors of models and optimizers.
        number, stages: of this one's pipeline stage, and how many there are.

    Raises:
        TypeError, ValueError: both are given, or a mesh of another kind.
    """

    def __init__(self, wire: Wire | None = None, mesh: Mesh | None = None):
        if mesh is None:
            self.wire = wire
            self.rank, self.size = (0, 1) if wire is None else (wire.rank, wire.size)
            self.everyone = self.stage = Among(self.rank, self.size)
            self.number, self.stages = 0, 1
            return
        if wire is not None:
            raise ValueError("both wire= and mesh= are given: a mesh has a wire of its own; leave wire out")
        if not isinstance(mesh, Mesh):
            raise TypeError(f"mesh={mesh!r} is a {type(mesh).__name__}: give a fasttrain.parallel.Mesh, which says "
                            "what each dimension divides (Mesh.of(device_mesh) makes one); or wire=, if all ranks hold "
                            "the same plain tensors")
        self.wire = mesh.wire()
        self.rank, self.size = mesh.rank, mesh.size
        self.everyone = OnMesh.along(mesh, AXES)
        self.stage = OnMesh.along(mesh, [axis for axis in AXES if axis != "pipeline"])
        self.number, self.stages = mesh.coordinates["pipeline"], mesh.sizes["pipeline"]
        if self.stages > 1:
            self.line = mesh.wire("pipeline")

    @property
    def leads(self) -> bool:
        """Whether it is the first of its stage, which tells what all of the stage know."""
        return self.stage.index == 0
