"""The last collective of a synchronised step: what every rank has done, compared on all of them.

It is one small all-reduce, which every rank issues, also one without any gradient. A table with a row for each rank is
summed, zero but for the own row, so that all see the same table and come to the same verdict. With it travel sums over
ranks: of squares and of what is not finite (the norm), of tokens, and for each parameter how many ranks used it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor

from fasttrain.dist.wire import Wire


class RanksDisagree(RuntimeError):
    """The ranks have not done the same in this step; the same text is raised on every one. No parameter was stepped."""


@dataclass(frozen=True)
class Done:
    """What one rank did since the last synchronised step.

    Attributes:
        sequence: synchronised steps before this one.
        backwards: backward passes, those under `no_sync` too.
        sent: a checksum of the collectives that were issued, in their order.
        gradients: parameters that have a gradient.
        late: 1 if no synchronised backward pass ended this step: an optimizer asked for the gradients.
        joined: 1 if it has no more data, and follows the others (`join`).
    """

    sequence: int
    backwards: int
    sent: int
    gradients: int
    late: int
    joined: int


WIDTH = len(fields(Done))


@dataclass(frozen=True)
class Agreement:
    """What all ranks know after the last collective.

    Attributes:
        ranks: what each did.
        sums: the sums over ranks of what was given.
        used: for each parameter, how many ranks have a gradient of it.
    """

    ranks: tuple[Done, ...]
    sums: tuple[float, ...]
    used: list[int]

    @property
    def active(self) -> int:
        """Ranks that still have data."""
        return sum(not done.joined for done in self.ranks)


class Agreeing:
    """The collective, issued on construction and read once.

    Arguments:
        done: what this rank did.
        sums: numbers to be added over ranks; tensors of one element on the wire's device are read there.
        used: for each parameter, whether this rank has a gradient of it.

    Attributes:
        sums: the sums over ranks, float64 of shape (len(sums),), on the wire's device.

    Raises:
        WireError: a rank ended or did not answer in time.
    """

    def __init__(self, wire: Wire, done: Done, sums: Sequence[float | Tensor], used: Sequence[bool]):
        self.size, self.width = wire.size, len(sums)
        mine = torch.zeros(wire.size * WIDTH, dtype=torch.float64)
        mine[wire.rank * WIDTH : (wire.rank + 1) * WIDTH] = torch.tensor(astuple(done), dtype=torch.float64)
        added = [torch.as_tensor(value, dtype=torch.float64).to(wire.device).reshape(1) for value in sums]
        table = torch.cat([mine.to(wire.device), *added,
                           torch.tensor(used, dtype=torch.float64).to(wire.device)])
        table = wire.sum_(table)
        self.sums = table[wire.size * WIDTH :][: len(sums)]
        if table.device.type == "cuda":  # copied without waiting, for whoever reads later
            self.table = torch.empty(table.shape, dtype=table.dtype, pin_memory=True).copy_(table, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()
        else:
            self.table, self.copied = table, None

    def read(self) -> Agreement:
        """The table, compared; on a GPU this waits until it has arrived.

        Raises:
            RanksDisagree: on every rank, with the same text.
        """
        if self.copied is not None:
            self.copied.synchronize()
        rows = self.table[: self.size * WIDTH].reshape(self.size, WIDTH).tolist()
        ranks = tuple(Done(*map(int, row)) for row in rows)
        if reason := disagreement(ranks):
            raise RanksDisagree(reason)
        rest = self.table[self.size * WIDTH :].tolist()
        return Agreement(ranks, tuple(rest[: self.width]), [round(count) for count in rest[self.width :]])


def disagreement(ranks: Sequence[Done]) -> str | None:
    """Why these ranks cannot have made one step together, or None."""
    if all(done == ranks[0] for done in ranks) and not ranks[0].late:
        return None
    here = [(rank, done) for rank, done in enumerate(ranks) if not done.joined]
    if not here:
        return None
    late = [rank for rank, done in here if done.late]
    for name, text in (("sequence", "are at different steps"), ("backwards", "ran backward a different number of times")):
        values = {getattr(done, name) for _, done in here}
        if len(values) > 1:
            return _text(text, {rank: f"{getattr(done, name)}" for rank, done in here}, late)
    none = [rank for rank, done in here if not done.gradients]
    if none and len(none) < len(here):
        return _text("disagree on whether there is any gradient",
                     {rank: f"{done.gradients} parameters with one" for rank, done in here}, late)
    if late and len(late) < len(here):
        return _text("disagree on whether this step is synchronised",
                     {rank: "step() under no_sync" if done.late else "synchronised" for rank, done in here}, late)
    if len({done.sent for done in ranks}) > 1:
        return _text("issued their collectives in different orders", {}, late)
    if late and here[0][1].gradients:
        return ("an optimizer steps gradients that were accumulated under no_sync() and never reduced, on every rank: "
                "run the last backward pass of a step outside of no_sync()")
    return None


def _text(what: str, each: dict[int, str], late: Sequence[int]) -> str:
    by_value: dict[str, list[int]] = {}
    for rank, value in each.items():
        by_value.setdefault(value, []).append(rank)
    shown = "; ".join(f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:8]))}"
                      f"{' and others' if len(ranks) > 8 else ''}: {value}" for value, ranks in by_value.items())
    hint = (f". Rank {late[0]} came to optimizer.step() without a synchronised backward pass: is it under no_sync(), or "
            "did its loss not reach any parameter?") if late else ""
    return f"the ranks {what} in this step{' (' + shown + ')' if shown else ''}, and no parameter was stepped{hint}"
