"""The ranks of a training in a grid of six axes, each of which divides something else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from fasttrain.dist.watcher import Watcher
from fasttrain.dist.watching import wire_over
from fasttrain.dist.wire import Wire

AXES = ("pipeline", "data", "shard", "expert", "context", "tensor")
MEAN = ("data", "shard", "expert", "context")
BATCH = ("data", "shard", "expert")
DIVIDES = {
    "pipeline": "the blocks, into stages one after the other",
    "data": "the batch; everything is held whole",
    "shard": "the batch; parameters, gradients and states, gathered when used",
    "expert": "the batch; the experts of mixtures, to which tokens are sent",
    "context": "each sequence",
    "tensor": "each matrix, inside of every block",
}


class Mesh:
    """Which part of the work each rank has, by its coordinates along six axes.

    ======== ==================================================================
    axis     what its ranks divide
    ======== ==================================================================
    pipeline the blocks of the model, into stages
    data     the batch; they hold the same
    shard    the batch, and parameters, gradients and states too (`shard`, ZeRO)
    expert   the batch, and the experts of mixtures; all else they hold alike
    context  each sequence
    tensor   each matrix
    ======== ==================================================================

    This is their order from the outermost: neighbouring ranks, which share the fastest links, differ along ``tensor``.
    A loss is a mean over the ranks of the axes `MEAN`, and those of `BATCH` read different samples. Every rank makes
    one, alike, and passes it to whoever needs it.

    Arguments:
        data: ranks along this axis; None: as many as are left of the world.
        shard, tensor, pipeline, expert, context: ranks along these.
        device: on which this rank computes; None: its GPU where torch.distributed was initialized with NCCL, else the
            CPU.
        timeout_s, watch: of the wires that it makes; see `fasttrain.parallel.Reducer`.

    Attributes:
        sizes: ranks along each axis, by name.
        coordinates: of this rank, by axis.
        size, rank: of the world, which the axes fill.
        terms: of how many ranks a gradient is the mean: those along `MEAN`.
        replicas, replica: how many ranks read different samples, and which of them this one is.
        device: torch.device.

    Raises:
        ValueError: the axes do not fill the world, or a size is none; on every rank with the same text.
        RuntimeError: torch.distributed is not initialized.

    Example:
        >>> mesh = Mesh(tensor=2, pipeline=2)           # of 8 ranks: data=2             # doctest: +SKIP
        >>> mesh["tensor"]                              # for torch's own functions      # doctest: +SKIP
        DeviceMesh((tensor=2), 'cpu', stride=(1,))
        >>> loader = Loader(data, 64, rank=mesh.replica, world=mesh.replicas)            # doctest: +SKIP
    """

    def __init__(self, *, data: int | None = None, shard: int = 1, tensor: int = 1, pipeline: int = 1, expert: int = 1,
                 context: int = 1, device: torch.device | str | None = None, timeout_s: float = 120,
                 watch: Watcher | bool = True):
        asked = {"pipeline": pipeline, "data": data, "shard": shard, "expert": expert, "context": context,
                 "tensor": tensor}
        self._begin(asked, None, device, timeout_s, watch)

    @classmethod
    def of(cls, mesh: DeviceMesh, *, timeout_s: float = 120, watch: Watcher | bool = True) -> Mesh:
        """That of a DeviceMesh of torch over all ranks, whose dimensions have names of axes, in their order.

        Raises:
            ValueError: a name is none of the axes, they stand in another order, or some ranks are not in it.
        """
        names = mesh.mesh_dim_names or ()
        check_axes(names, "the dimensions of a mesh")
        made = cls.__new__(cls)
        sizes: dict[str, int | None] = {axis: mesh.size(names.index(axis)) if axis in names else 1 for axis in AXES}
        made._begin(sizes, mesh.mesh, mesh.device_type, timeout_s, watch)
        return made

    def _begin(self, asked: Mapping[str, int | None], ranks: torch.Tensor | None, device: Any, timeout_s: float,
               watch: Watcher | bool) -> None:
        if not dist.is_initialized():
            raise RuntimeError("torch.distributed is not initialized: call init_process_group, under torchrun, before "
                               "a Mesh is made")
        self.device, self.timeout_s = device_of(device), timeout_s
        self._wires: dict[tuple[str, ...], Wire] = {}
        everyone = self._wires[AXES] = wire_over(None, self.device, timeout_s, watch)
        self.size, self.rank = everyone.size, everyone.rank
        agree_on(asked, everyone)
        self.sizes = filled(asked, self.size)
        shape = tuple(self.sizes.values())
        self._ranks = torch.arange(self.size).view(shape) if ranks is None else ranks.cpu().view(shape)
        self.torch = DeviceMesh(self.device.type, self._ranks, mesh_dim_names=AXES)
        where = (self._ranks == self.rank).nonzero()[0].tolist()
        self.coordinates = dict(zip(AXES, where, strict=True))
        self._wires = {self._long(AXES): everyone}

    # --- Axes ---------------------------------------------------------------------------------------------------------

    def __getitem__(self, axes: str | tuple[str, ...]) -> DeviceMesh:
        """A mesh of torch along one axis, or along several; of these, those of one rank are left out if there are more.

        All are slices of one mesh.

        Raises:
            ValueError: there is no such axis, or they stand in another order than `AXES`.
        """
        if isinstance(axes, str):
            check_axes((axes,))
            return self.torch[axes]
        check_axes(axes)
        long = self._long(axes) or axes[:1]
        return self.torch[long if len(long) > 1 else long[0]]

    def ranks(self, *axes: str) -> list[int]:
        """The ranks that differ from this one along these axes only, itself among them, ascending."""
        check_axes(axes)
        index = tuple(slice(None) if axis in axes else self.coordinates[axis] for axis in AXES)
        return sorted(self._ranks[index].flatten().tolist())

    def wire(self, *axes: str, use: str = "") -> Wire:
        """The wire over `ranks`; without axes over all ranks. All its ranks ask for it at the same place of a program.

        One wire is made of each choice of axes and each `use`: whoever asks again gets the same, and those who issue
        collectives while others do name their use.
        """
        check_axes(axes)
        long = self._long(axes or AXES)
        key = (*long, use) if use else long
        if key not in self._wires:
            everyone = self._wires[self._long(AXES)]
            self._wires[key] = Wire(self.device, self.timeout_s, self.ranks(*long), everyone.watch)
        return self._wires[key]

    def _long(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        """Those of more than one rank."""
        return tuple(axis for axis in axes if self.sizes[axis] > 1)

    def count(self, *axes: str) -> int:
        """How many ranks there are along these axes together."""
        return math.prod(self.sizes[axis] for axis in axes)

    def index(self, *axes: str) -> int:
        """Which of them this rank is, the last axis fastest."""
        found = 0
        for axis in axes:
            found = found * self.sizes[axis] + self.coordinates[axis]
        return found

    @property
    def terms(self) -> int:
        return self.count(*MEAN)

    @property
    def replicas(self) -> int:
        return self.count(*BATCH)

    @property
    def replica(self) -> int:
        return self.index(*BATCH)

    @property
    def last_stage(self) -> bool:
        """Whether this rank is at the end of its pipeline."""
        return self.coordinates["pipeline"] == self.sizes["pipeline"] - 1

    def close(self) -> None:
        """End its wires: nothing may be under way."""
        for wire in self._wires.values():
            wire.close()
        self._wires = {}

    def __str__(self) -> str:
        long = self._long(AXES)
        title = " x ".join(f"{axis} {self.sizes[axis]}" for axis in long) or "one rank"
        lines = [f"mesh of {self.size} ranks: {title}", "axis      ranks  apart   here  divides"]
        for place, axis in enumerate(AXES):
            apart = math.prod(list(self.sizes.values())[place + 1:])
            lines.append(f"{axis:<8}  {self.sizes[axis]:>5}  {apart:>5}  {self.coordinates[axis]:>5}  {DIVIDES[axis]}")
        return "\n".join(lines)

    def __deepcopy__(self, memo: dict[int, Any]) -> Mesh:
        """Itself: a copy of what lies on it lies on the same ranks."""
        return self

    def __repr__(self) -> str:
        return f"Mesh({', '.join(f'{axis}={size}' for axis, size in self.sizes.items())})"


def check_axes(axes: tuple[str, ...], what: str = "axes") -> None:
    """Raise ValueError for names that are no axes, or not in the order of `AXES`."""
    if unknown := [axis for axis in axes if axis not in AXES]:
        raise ValueError(f"{unknown[0]!r} is no axis of a mesh: there are {', '.join(AXES)}")
    ordered = tuple(axis for axis in AXES if axis in axes)
    if tuple(axes) != ordered:
        raise ValueError(f"{what} stand as {', '.join(axes)}: give each once, in the order {', '.join(ordered)}")


def device_of(device: torch.device | str | None) -> torch.device:
    """The device of this rank."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() and "nccl" in dist.get_backend() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def agree_on(asked: Mapping[str, int | None], everyone: Wire) -> None:
    """Raise ValueError, on every rank alike, if the ranks ask for different meshes."""
    texts = everyone.gather_objects_json(json.dumps(dict(asked)))
    for rank, text in enumerate(texts):
        if text != texts[0]:
            raise ValueError(f"the ranks make different meshes: rank 0 asks for {texts[0]}, rank {rank} for {text}")


def filled(asked: Mapping[str, int | None], world: int) -> dict[str, int]:
    """The sizes of all axes, data with what is left of the world.

    Raises:
        ValueError: they do not fill it.

    Example:
        >>> filled({"pipeline": 2, "data": None, "shard": 1, "expert": 1, "context": 1, "tensor": 2}, 8)["data"]
        2
    """
    for axis, size in asked.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"{axis}={size!r}: an axis has 1 rank or more")
    given = {axis: size for axis, size in asked.items() if size is not None}
    product, told = math.prod(given.values()), " x ".join(f"{axis} {size}" for axis, size in given.items() if size > 1)
    if world % product or (product != world and len(given) == len(asked)):
        raise ValueError(f"a mesh of {told or 'data 1'} has {product} ranks, and there are {world}: "
                         + ("start a multiple of that many, or give smaller sizes" if len(given) < len(asked) else
                            "start as many, or leave data out, which then takes what is left"))
    return {axis: world // product if size is None else size for axis, size in asked.items()}
