"""Which rank of a pipeline has which stages."""

from __future__ import annotations

from typing import NamedTuple


class Placement(NamedTuple):
    """Stages on the ranks of a pipeline, as many on each.

    A "loop" has stage s on rank s mod p, so that a micro-batch goes round several times; a "v" goes down the ranks and
    up again, so that the first rank has the first stage and the last.

    Arguments:
        ranks: of the pipeline.
        each: stages on each of them.
        shape: "loop" or "v".

    Example:
        >>> Placement(2, 2, "loop").of(0), Placement(2, 2, "v").of(0)
        ([0, 2], [0, 3])
    """

    ranks: int
    each: int = 1
    shape: str = "loop"

    @property
    def stages(self) -> int:
        """All of them."""
        return self.ranks * self.each

    def rank(self, stage: int) -> int:
        """The rank along the pipeline that has this stage."""
        lap, place = divmod(stage, self.ranks)
        return self.ranks - 1 - place if self.shape == "v" and lap % 2 else place

    def of(self, rank: int) -> list[int]:
        """The stages of this rank, ascending."""
        return [stage for stage in range(self.stages) if self.rank(stage) == rank]

    @property
    def last(self) -> int:
        """The rank that has the last stage, and so the loss."""
        return self.rank(self.stages - 1)
