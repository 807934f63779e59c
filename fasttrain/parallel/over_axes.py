"""The ranks of a reducer: the wire of each group of parameters, and those over which a step is compared.

Over a `Wire`, a process group or a DeviceMesh all parameters are of one group, which is all there is. Over a `Mesh` the
ranks of a stage hold the same parameters, or parts of them, and compare each step; one small all-reduce more runs along
the pipeline, where it has several stages.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fasttrain.dist.fingerprint import DisagreementError, Fingerprint, agree, fingerprint
from fasttrain.dist.layout import Entry, FlatLayout
from fasttrain.dist.mesh import MEAN, Mesh
from fasttrain.dist.wire import Wire
from fasttrain.dist.work import Watch
from fasttrain.optim.local import is_dtensor, local
from fasttrain.parallel import tied_names
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
        members: ranks of each group, by name, ascending.
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
    _tied: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    _watch: Watch | None = None

    def __init__(self, wire: Wire, count: int):
        self.wire, self.terms, self.number = wire, wire.size, wire.rank
        self.groups, self.members, self.wires = {PLAIN: Group()}, {PLAIN: wire.ranks}, {PLAIN: wire}
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
        made.ties, made._tied = [names.get(name) for name in tied], {name: tuple(tied[name]) for name in tied}
        made.members = {name: group.ranks(mesh) for name, group in made.groups.items()}
        made._watch, made.wires = mesh.wire().watch, {}
        made.wire = made._wire(mesh.ranks(*MEAN, "tensor"))
        if mesh.sizes["pipeline"] > 1:
            made.across = made._wire(mesh.ranks("pipeline"))
        return made

    def _wire(self, ranks: list[int]) -> Wire:
        """A wire of its own, because gradients travel while others issue collectives."""
        assert self.mesh is not None
        return Wire(self.mesh.device, self.mesh.timeout_s, ranks, self._watch)

    def _connect(self) -> None:
        """Make the wires of groups: one for each choice of ranks, in an order that all ranks share, so that none waits
        for another in a circle."""
        made = {tuple(self.wire.ranks): self.wire}
        for ranks in sorted(self.members.values()):
            if tuple(ranks) not in made:
                made[tuple(ranks)] = self._wire(ranks)
        self.wires = {name: made[tuple(ranks)] for name, ranks in self.members.items()}

    # --- What it is made of -------------------------------------------------------------------------------------------

    @property
    def worlds(self) -> dict[str, int]:
        """Ranks of each group, as a layout takes them."""
        return {name: len(ranks) for name, ranks in self.members.items()} or {PLAIN: 1}

    @property
    def everyone(self) -> list[Wire]:
        """All wires, each once."""
        found = [self.wire, *self.wires.values(), *([self.across] if self.across else [])]
        return list({id(wire): wire for wire in found}.values())

    @property
    def single(self) -> bool:
        """Whether there is one group alone, of all ranks that compare and of as many as a gradient is the mean of."""
        return self.across is None and self.terms == self.wire.size and len(self.groups) == 1 and all(
            ranks == self.wire.ranks for ranks in self.members.values())

    def carry(self, name: str) -> float:
        """What the mean of an earlier pass is multiplied by where gradients of a group add to it."""
        return self.terms / len(self.members[name])

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
        """Raise on all ranks that compare if they were not built alike; then connect the groups.

        The ranks of a stage compare parameters by their whole shapes and their placements, as parts may differ in size;
        those along the pipeline the options; those of a tie the tied parameters, whatever each stage calls them.

        Raises:
            DisagreementError: the same text on every rank that compares.
            ValueError: a tie is of parameters that are not trained here.
        """
        entries, laid = list(layout.entries), layout
        mesh = None if self.mesh is None else self.mesh.sizes
        divided: list[tuple[str, Any]] = [(name, p) for name, p in named if is_dtensor(p)]
        if divided:
            entries = self.entries(named, whole=True)
            laid = relaid(layout, entries, self.worlds)
        placements = {name: [str(placement) for placement in p.placements] for name, p in divided}
        self._agree_in_all_stages(fingerprint(entries, laid, options | {"placements": placements}, mesh=mesh))
        if self.across is not None:
            common = {key: options[key] for key in ("wire", "static_graph")}
            agree(self.across, fingerprint([], FlatLayout.of([], 1), common | {
                "layout": vars(layout.options), "ties": list(self._tied.values()), "held as said": not self._missing},
                mesh=mesh))
            if self._missing:
                name = self._missing[0]
                raise ValueError(f"{name} is tied across stages {list(self._tied[name])}, and is no trained parameter "
                                 "of this one: leave out ties that nobody trains, and name parameters as this stage "
                                 "does")
        if self.mesh is not None:
            self._connect()
        for name in sorted(self.groups, key=lambda name: self.members[name]):
            if self.groups[name].stages:
                mine = sorted((entry for entry in entries if entry.group == name),
                              key=lambda entry: layout.order.index(entry.name))
                ties = [replace(entry, name=f"tie {place}") for place, entry in enumerate(mine)]
                agree(self.wires[name], fingerprint(ties, FlatLayout.of(ties, {name: self.wires[name].size}), {
                    "placements": [placements.get(entry.name) for entry in mine]}))
                known, stage = dict(named), 0 if self.mesh is None else self.mesh.coordinates["pipeline"]
                tied_names.settle(self.wires[name], stage, [(entry.name, known[entry.name]) for entry in mine])

    def _agree_in_all_stages(self, mine: Fingerprint) -> None:
        """Compare with the ranks of this stage, and raise if those of any stage differ."""
        told = []
        try:
            agree(self.wire, mine)
        except DisagreementError as error:
            told = [str(error)]
        if self.across is not None:
            told = [text for texts in self.across.gather_objects_json(json.dumps(told)) for text in json.loads(texts)]
        if told:
            raise DisagreementError("\n".join(told))

    @property
    def _missing(self) -> list[str]:
        """Ties that name this stage, which does not hold the parameter."""
        here = 0 if self.mesh is None else self.mesh.coordinates["pipeline"]
        return [name for (name, stages), index in zip(self._tied.items(), self.ties, strict=True)
                if here in stages and index is None]

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
