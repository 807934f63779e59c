"""What a schedule did, on a clock: actions wait for those that they need, and for the rank that runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Action(NamedTuple):
    """One thing that a stage did for one micro-batch.

    Attributes:
        kind: "F" forward, "B" backward, "I" backward for inputs only, "W" for weights only; "R" the reduction of the
            stage's gradients begins, for which the micro-batch is -1.
        stage, micro_batch: counted from 0.
    """

    kind: str
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{'' if self.micro_batch < 0 else self.micro_batch}"


UNIT = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0, "R": 0.0}  # equal times for F, I and W: as the papers compare


class Times(NamedTuple):
    """When each action ran.

    Attributes:
        begin, end: of each action.
        ranks: actions of each rank, in their order.
    """

    begin: Mapping[Action, float]
    end: Mapping[Action, float]
    ranks: Sequence[Sequence[Action]]

    def span(self, rank: int) -> float:
        """From the first action of a rank to the end of its last."""
        return max(map(self.end.__getitem__, self.ranks[rank])) - min(map(self.begin.__getitem__, self.ranks[rank]))

    def busy(self, rank: int) -> float:
        """The time of its actions."""
        return sum(self.end[action] - self.begin[action] for action in self.ranks[rank])

    def idle(self) -> float:
        """The most that a rank was idle between its first and last action, over the time that it worked.

        As the zero-bubble paper has it (arXiv 2401.10241, section 5.3). The pace of many steps is set by the longest
        span of a rank, not by the time from the first action of all to the last.
        """
        return max(self.span(rank) / self.busy(rank) - 1 for rank in range(len(self.ranks)))

    def bubble(self) -> float:
        """The part of the longest span in which its rank was idle."""
        return self.idle() / (1 + self.idle())


def run(ranks: Sequence[Sequence[Action]], cost: Mapping[str, float] | Callable[[Action], float] = UNIT) -> Times:
    """Put actions on a clock on which messages take no time.

    Arguments:
        ranks: what each rank did, in its order.
        cost: of an action, or by its kind.

    Raises:
        ValueError: the order is not legal: an action waits for one that never comes, or comes twice.

    Example:
        >>> gpipe = [[Action(kind, rank, i) for kind in "FB" for i in range(2)] for rank in range(2)]
        >>> run(gpipe).idle()            # (p - 1) / m
        0.5
    """
    price = cost if callable(cost) else lambda action: cost[action.kind]
    stages = 1 + max(action.stage for actions in ranks for action in actions)
    begin: dict[Action, float] = {}
    end: dict[Action, float] = {}
    free, at = [0.0] * len(ranks), [0] * len(ranks)
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(ranks):
            while at[rank] < len(actions):
                action = actions[at[rank]]
                if action in end:
                    raise ValueError(f"{action} ran twice")
                when = _ready(action, end, stages)
                if when is None:
                    break
                begin[action] = max(free[rank], when)
                end[action] = free[rank] = begin[action] + price(action)
                at[rank] += 1
                moved = True
    for rank, actions in enumerate(ranks):
        if at[rank] < len(actions):
            raise ValueError(f"rank {rank} cannot run {actions[at[rank]]}: what it needs has not run before")
    return Times(begin, end, ranks)


def _ready(action: Action, end: Mapping[Action, float], stages: int) -> float | None:
    """When all that an action needs has ended; None: it has not."""
    kind, stage, number = action
    if kind == "R":
        return 0.0
    if kind == "F":
        needs: list[tuple[Action, ...]] = [(Action("F", stage - 1, number),)] if stage else []
    elif kind == "W":
        needs = [(Action("I", stage, number),)]
    else:
        needs = [(Action("F", stage, number),)]
        if stage < stages - 1:
            needs.append((Action("B", stage + 1, number), Action("I", stage + 1, number)))
    times = [next((end[one] for one in ways if one in end), None) for ways in needs]
    known = [time for time in times if time is not None]
    return max(known, default=0.0) if len(known) == len(times) else None


def most_live(actions: Sequence[Action]) -> int:
    """The most micro-batches whose activations a rank held at once, each stage of it by itself.

    They are held from the forward pass to the end of the backward pass, the one for weights where it is split.

    Example:
        >>> most_live([Action("F", 0, 0), Action("F", 0, 1), Action("B", 0, 0), Action("B", 0, 1)])
        2
    """
    live = most = 0
    for action in actions:
        live += {"F": 1, "B": -1, "W": -1}.get(action.kind, 0)
        most = max(most, live)
    return most
