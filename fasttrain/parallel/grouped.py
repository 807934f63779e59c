"""Groups of parameters on a mesh, each with a way of its own for its buckets, as one `Method`."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fasttrain.dist.layout import FlatLayout
from fasttrain.dist.wire import Wire
from fasttrain.parallel.buckets import Bucket
from fasttrain.parallel.over_axes import Reach
from fasttrain.parallel.wires import METHODS, Int8, Method, Sent, method_of


class Alone(Method):
    """The way of a group of one rank: buckets stay where they are, divided as they are packed."""

    name = "alone"

    @property
    def factor(self) -> float:
        return 1.0 / self.divisor

    def send(self, index: int, bucket: Bucket) -> Sent:
        self.issued(index, len(bucket.data))
        return Sent(Here(), bucket.data)


class Here:
    """A work of nothing."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        """Nothing to wait for."""


class Grouped(Method):
    """A method for each group, on the wire of that group; all divide by the ranks of which a gradient is the mean.

    Arguments:
        methods: by the name of the group.
        reach: the groups.
        name: by which users call them.
    """

    def __init__(self, methods: Mapping[str, Method], reach: Reach, name: str):
        self.methods, self.reach, self.name = dict(methods), reach, name

    @property
    def final(self) -> bool:  # type: ignore[override]  # an attribute elsewhere, only read here
        return any(method.final for method in self.methods.values())

    @property
    def holding(self) -> bool:  # type: ignore[override]  # an attribute elsewhere, only read here
        return any(method.holding for method in self.methods.values())

    @property
    def checksum(self) -> int:  # type: ignore[override]  # an attribute elsewhere, only read here
        """Of all groups together; of their names alone where the ranks that compare have buckets of other sizes."""
        text = " ".join(f"{group} {method.name} {method.checksum if self.reach.alike else ''}"
                        for group, method in sorted(self.methods.items()))
        return zlib.crc32(text.encode())

    def prepare(self, wire: Wire, layout: FlatLayout) -> None:
        self.wire, self.layout, self.divisor = wire, layout, self.reach.terms
        for group, method in self.methods.items():
            method.group = group
            method.prepare(self.reach.wires[group], layout)
            method.divisor = self.divisor

    def of(self, group: str) -> Method:
        return self.methods[group]

    def send(self, index: int, bucket: Bucket) -> Sent:
        return self.methods[bucket.plan.group].send(index, bucket)

    def begin(self) -> None:
        for method in self.methods.values():
            method.begin()

    def look(self) -> None:
        for method in self.methods.values():
            method.look()

    def ended(self, used: Sequence[bool]) -> None:
        for method in self.methods.values():
            method.ended(used)

    def drop(self) -> None:
        for method in self.methods.values():
            method.drop()

    def rescale(self, factor: float) -> None:
        for method in self.methods.values():
            method.rescale(factor)


class GroupedCodes(Grouped):
    """Of `Int8`, whose residuals are a state of each rank."""

    per_rank = True

    def state_dict(self) -> dict[str, Any]:
        """The residuals of this rank, by group."""
        return {"mesh": self._sizes(), "groups": {group: method.state_dict() for group, method in self._own().items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over residuals of this rank.

        Raises:
            ValueError: they are of another mesh, or of other buckets.
        """
        own = self._own()
        if dict(state["mesh"]) != self._sizes() or set(state["groups"]) != set(own):
            raise ValueError(f"residuals of {', '.join(state['groups'])} on a mesh of {dict(state['mesh'])}, and these "
                             f"are of {', '.join(own)} on {self._sizes()}")
        for group, method in own.items():
            method.load_state_dict(state["groups"][group])

    def of_rank(self, state: Mapping[str, Any], rank: int, world: int) -> None:
        """Take over the residuals of a rank of the same mesh; those of another are of other shares of the gradients,
        and begin at zero, and a warning says so."""
        if dict(state.get("mesh", {})) == self._sizes():
            self.load_state_dict(state)
            return
        for method in self._own().values():
            for residual in method.residuals:
                residual.zero_()
        if self.reach.number == 0:
            warnings.warn(f"wire='int8': what the codes on a mesh of {dict(state.get('mesh', {}))} have lacked is not "
                          f"what those on {self._sizes()} will: error feedback begins anew", stacklevel=2)

    def _own(self) -> dict[str, Int8]:
        return {group: method for group, method in self.methods.items() if isinstance(method, Int8)}

    def _sizes(self) -> dict[str, int]:
        return dict(self.reach.mesh.sizes) if self.reach.mesh is not None else {}


def grouped(wire: str | Method | Callable[[], Method], reach: Reach) -> Method:
    """How buckets travel between these ranks.

    Arguments:
        wire: a name, or what makes a method; a method that is made already where there is one group alone.

    Raises:
        ValueError: there is no such name, or one method for several groups.
    """
    if reach.single:
        return method_of(wire)
    if isinstance(wire, Method):
        if isinstance(wire, Grouped):
            return wire
        raise ValueError(f"a method of {type(wire).__name__} serves one group of ranks, and on this mesh there are "
                         f"{', '.join(reach.groups) or 'none'}: give its class, of which each group gets its own, or a "
                         f"name: {', '.join(METHODS)}")
    name = method_of(wire).name
    made = {group: Alone() if reach.worlds[group] == 1 else method_of(wire) for group in reach.groups}
    return (GroupedCodes if name == Int8.name else Grouped)(made, reach, name)
