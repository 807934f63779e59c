"""Over which ranks the states of each group of parameters are divided.

They are those over which its gradients are added up. Only parameters that several stages of a pipeline have are divided
in each stage by itself: each keeps and steps all of its copy, from the same sums of gradients and so to the same bits,
and whatever else sees a stage's optimizer (a checkpoint) finds its parameters whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from fasttrain.dist.slots import Bucket
from fasttrain.dist.wire import Wire
from fasttrain.parallel import zero_cut
from fasttrain.parallel.over_axes import Reach
from fasttrain.parallel.zero_cut import Cut


class Division(NamedTuple):
    """Of one group.

    Attributes:
        wire: between the ranks that have different parts.
        turns: of the ranks that add up its gradients, in their order: which part each has.
        counts: this rank measures its part of the gradients, and no other stage does.
    """

    wire: Wire
    turns: tuple[int, ...]
    counts: bool = True

    def among_all(self, cut: Cut) -> Cut:
        """From the parts that there are to that of each rank that adds up gradients."""
        return tuple(cut[turn] for turn in self.turns)


def divisions(reach: Reach) -> dict[str, Division]:
    """Of each group, by name; makes the wires that are missing."""
    made: dict[str, Division] = {}
    for name, group in sorted(reach.groups.items()):
        wire, mesh = reach.wires[name], reach.mesh
        if mesh is None or not group.stages:
            made[name] = Division(wire, tuple(range(wire.size)))
            continue
        turns = {rank: turn for stage in group.stages
                 for turn, rank in enumerate(replace(group, stages=(stage,)).ranks(mesh))}
        own = Wire(mesh.device, mesh.timeout_s, mesh.ranks(*group.axes), wire.watch)
        made[name] = Division(own, tuple(turns[rank] for rank in wire.ranks),
                              mesh.coordinates["pipeline"] == group.stages[0])
    return made


def cuts_of(plans: Sequence[Bucket], known: Mapping[str, Division], costs: Mapping[str, float] | None) -> list[Cut]:
    """The parts of each bucket: equal shards, or whole parameters of even cost."""
    counts = [known[plan.group].wire.size for plan in plans]
    if costs is None:
        return [zero_cut.shards(plan, count) for plan, count in zip(plans, counts, strict=True)]
    return zero_cut.whole(plans, costs, counts)
