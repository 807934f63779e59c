"""The ranks of a reducer: the wire of each group of parameters, and those over which a step is compared.

Over a `Wire`, a process group or a DeviceMesh all parameters are of one group, which is all there is. Over a `Mesh` the
ranks of a stage hold the same parameters, or parts of them, and compare each step; one small all-reduce more runs along
the pipeline, where it has several stages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fasttrain.dist.fingerprint import agree, fingerprint
from fasttrain.dist.layout import Entry, FlatLayout
from fasttrain.dist.mesh import MEAN, Mesh
from fasttrain.dist.wire import Wire
from fasttrain.optim.local import is_dtensor, local
from fasttrain.parallel.groups import PLAIN, Group, evenly_cut, group_of
from fasttrain.parallel.wires import Parts


class Reach:
    """Who takes part in the steps of a reducer, and how.

    Attributes:
        wire: to the ranks that compare every step: those of this stage.
        across: to the same place in the other stages; None if there are none.
        terms: of how many ranks a gradient is the mean.
        speaks: whether the loss and the items of this rank count: where several have the same, one of them does.
        number: by which errors call this rank.
        groups: of parameters, by name.
        wires: of each group, by name.
        group: of each parameter, in their order.
        ties: of parameters that lie on several stages: the index of each here, or None, in an order that all stages
            share.
        alike: whether all ranks that compare have buckets of the same sizes.
        mesh: or None.
    """

    across: Wire | None = None
    mesh: Mesh | None = None
    speaks = alike = True
    ties: Sequence[int | None] = ()

    def __init__(self, wire: Wire, count: int):
        self.wire, self.terms, self.number = wire, wire.size, wire.rank
        self.groups, self.wires = {PLAIN: Group()}, {PLAIN: wire}
        self.group = [PLAIN] * count

    @classmethod
    def over(cls, mesh: Mesh, named: Sequence[tuple[str, Tensor]], tied: Mapping[str, Sequence[int]]) -> Reach:
        """That of parameters on a mesh; every rank asks for it."""
        made = cls.__new__(cls)
        found = [group_of(name, p, mesh, tied.get(name, ())) for name, p in named]
        made.mesh, made.terms, made.number = mesh, mesh.terms, mesh.rank
        made.group, made.groups = [group.name for group in found], {group.name: group for group in found}
        made.speaks = mesh.last_stage and mesh.coordinates["tensor"] == 0
        made.alike = all(evenly_cut(p) for _, p in named)
        names = {name: index for index, (name, _) in enumerate(named)}
        made.ties = [names.get(name) for name in tied]
        made._connect(mesh)
        return made

    def _connect(self, mesh: Mesh) -> None:
        """Make the wires: their own, because gradients travel while others issue collectives.

        Of every choice of ranks one, in an order that all ranks share, so that none waits for another in a circle.
        """
        here, along = mesh.ranks(*MEAN, "tensor"), mesh.ranks("pipeline")
        members = {name: group.ranks(mesh) for name, group in self.groups.items()}
        watch = mesh.wire().watch
        made: dict[tuple[int, ...], Wire] = {}
        for ranks in sorted({tuple(ranks) for ranks in (here, along, *members.values()) if ranks is not along
                             or len(along) > 1}):
            made[ranks] = Wire(mesh.device, mesh.timeout_s, ranks, watch)
        self.wire, self.across = made[tuple(here)], made[tuple(along)] if len(along) > 1 else None
        self.wires = {name: made[tuple(ranks)] for name, ranks in members.items()}

    # --- What it is made of -------------------------------------------------------------------------------------------

    @property
    def worlds(self) -> dict[str, int]:
        """Ranks of each group, as a layout takes them."""
        return {name: wire.size for name, wire in self.wires.items()} or {PLAIN: 1}

    @property
    def everyone(self) -> list[Wire]:
        """All wires, each once."""
        found = [self.wire, *self.wires.values(), *([self.across] if self.across else [])]
        return list({id(wire): wire for wire in found}.values())

    @property
    def single(self) -> bool:
        """Whether there is one group alone, of all ranks that compare and of as many as a gradient is the mean of."""
        return self.across is None and self.terms == self.wire.size and len(self.groups) == 1 and all(
            wire is self.wire for wire in self.wires.values())

    def carry(self, name: str) -> float:
        """What the mean of an earlier pass is multiplied by where gradients of a group add to it."""
        return self.terms / self.wires[name].size

    def entries(self, named: Sequence[tuple[str, Tensor]], whole: bool = False) -> list[Entry]:
        """The entries of a layout; `whole`: of all ranks' parts together, which are compared."""
        return [Entry(name, tuple(held.shape), p.dtype, str(p.device), group, held.stride(), p.requires_grad)
                for (name, p), group in zip(named, self.group, strict=True) for held in [p if whole else local(p)]]

    def order(self, named: Sequence[tuple[str, Tensor]], order: Sequence[str] | None) -> Sequence[str] | None:
        """The order of a layout: tied parameters last, in the order that all stages share."""
        tied = [named[index][0] for index in self.ties if index is not None]
        if not tied:
            return order
        given = [name for name, _ in reversed(named)] if order is None else order
        return [*(name for name in given if name not in set(tied)), *tied]

    # --- Agreeing -----------------------------------------------------------------------------------------------------

    def agree(self, named: Sequence[tuple[str, Tensor]], layout: FlatLayout, options: dict[str, Any]) -> None:
        """Raise on all ranks that compare if they were not built alike.

        The ranks of a stage compare parameters by their whole shapes and their placements, as parts may differ in size;
        those along the pipeline the options; those of a tie the tied parameters, whatever each stage calls them.

        Raises:
            DisagreementError: the same text on every rank that compares.
        """
        entries, laid = list(layout.entries), layout
        mesh = None if self.mesh is None else self.mesh.sizes
        divided: list[tuple[str, Any]] = [(name, p) for name, p in named if is_dtensor(p)]
        if divided:
            entries = self.entries(named, whole=True)
            laid = relaid(layout, entries, self.worlds)
        placements = {name: [str(placement) for placement in p.placements] for name, p in divided}
        agree(self.wire, fingerprint(entries, laid, options | {"placements": placements}, mesh=mesh))
        if self.across is not None:
            common = {"options": {key: options[key] for key in ("wire", "static_graph")}, "ties": len(self.ties),
                      "layout": dict(vars(layout.options))}
            agree(self.across, fingerprint([], FlatLayout.of([], 1), common, mesh=mesh))
        for name in sorted(self.groups, key=lambda name: self.wires[name].ranks):
            if self.groups[name].stages:
                mine = sorted((entry for entry in entries if entry.group == name),
                              key=lambda entry: layout.order.index(entry.name))
                ties = [replace(entry, name=f"tie {place}") for place, entry in enumerate(mine)]
                agree(self.wires[name], fingerprint(ties, FlatLayout.of(ties, {name: self.wires[name].size}), {
                    "placements": [placements.get(entry.name) for entry in mine]}))

    # --- In every step ------------------------------------------------------------------------------------------------

    def counted(self, names: Iterable[str], parts: list[Parts]) -> list[Parts]:
        """What this rank measured of buckets of these groups; zero where another rank tells of the same gradients."""
        if self.mesh is None or not any(group.copies for group in self.groups.values()):
            return parts
        mesh = self.mesh
        return [(squares if self.groups[name].counts(mesh) else torch.zeros_like(squares), bad)
                for name, (squares, bad) in zip(names, parts, strict=True)]


def relaid(layout: FlatLayout, entries: Sequence[Entry], worlds: Mapping[str, int]) -> FlatLayout:
    """The layout of other entries by the same options."""
    return FlatLayout.of(entries, worlds, order=layout.order, **vars(layout.options))
