"""What a rank holds of a model that was split, and how it is found again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from fasttrain.parallel.pipeline.placement import Placement
from fasttrain.parallel.pipeline.tied import Tie

MARK = "pipeline_held"


class Held(NamedTuple):
    """What `split` has decided.

    Attributes:
        schedule: for which the stages were placed.
        placement: of the stages on the ranks of the pipeline.
        rank: of this process along the pipeline.
        stages: the names of the parts of every stage.
        costs: of every stage, by which the parts were cut.
        names: of the parameters of each stage that is held here, by its number.
        ties: parameters that several ranks hold, in one order on all.
    """

    schedule: str
    placement: Placement
    rank: int
    stages: list[list[str]]
    costs: list[float]
    names: Mapping[int, list[str]]
    ties: Sequence[Tie]

    @property
    def mine(self) -> list[int]:
        """The stages of this rank."""
        return self.placement.of(self.rank)

    @property
    def is_last(self) -> bool:
        """Whether this rank has the last stage, and so the loss."""
        return self.rank == self.placement.last

    def table(self) -> str:
        """The stages, a line each.

        Example:
            >>> print(Held("1f1b", Placement(2), 0, [["0", "1"], ["2"]], [3.0, 2.0], {}, ()).table())
            stage  rank  cost   parts
                0     0   60.0%  0 .. 1
                1     1   40.0%  2
        """
        whole = sum(self.costs) or 1.0
        lines = ["stage  rank  cost   parts"]
        for stage, parts in enumerate(self.stages):
            told = parts[0] if len(parts) == 1 else f"{parts[0]} .. {parts[-1]}"
            lines.append(f"{stage:>5}  {self.placement.rank(stage):>4}  {self.costs[stage] / whole:>6.1%}  {told}")
        return "\n".join(lines)


def of(model: Any) -> Held:
    """What a rank holds of a model.

    Raises:
        TypeError: the model was not split.
    """
    found = getattr(model, MARK, None) if isinstance(model, nn.Module) else None
    if not isinstance(found, Held):
        raise TypeError(f"{type(model).__name__} was not split into stages: call fasttrain.parallel.pipeline.split"
                        "(model, mesh) first, before it is wrapped or sharded")
    return found


def ties(model: Any) -> dict[str, tuple[int, ...]]:
    """Which parameters several stages have, by their names on this rank: the places along the pipeline of all copies.

    It is what `DataParallel`, `Reducer` and `shard` take as ``tied``. Those that are not held here are in it too, by
    their names in the whole model, so that the order is that of all ranks.

    Arguments:
        model: what `split` returned.
    """
    return {tie.here or tie.name: tie.ranks for tie in of(model).ties}


def names_of_whole(model: Any) -> dict[str, str]:
    """By the names of tied parameters on this rank, what they are called in the whole model: the first stage's name."""
    return {tie.here: tie.name for tie in of(model).ties if tie.here is not None}
