"""The small collective that ends every synchronised step: do the ranks agree, and what do all of them add up to.

Every rank issues it in every such step, whatever has become of its gradients. It carries numbers on which the ranks have
to agree (which step, how many buckets), and numbers that are added: squares of the gradient, whether it is finite,
tokens, the loss, wishes to stop, and which parameters took part. Where they disagree, every rank raises the same error. Without it
torch would not notice: two ranks that issue two all-reduces of one size in swapped order get wrong sums.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fasttrain.dist.wire import Wire
from fasttrain.dist.work import Work, WireError

EXACT = 2**53  # whole numbers up to here are float64
SUMMED = ("squares", "nonfinite", "culprit", "tokens", "stop", "loss")


class Disagreement(WireError):
    """The ranks are not in the same place of the same program."""


class Extremes(NamedTuple):
    """Over the ranks, element by element."""

    min: Tensor
    max: Tensor
    sum: Tensor


def control(wire: Wire, vector: Tensor) -> Extremes:
    """Minimum, maximum and sum over the ranks of a small vector, in one round: the same bits on every rank.

    Arguments:
        vector: flat, float64 or int64, of the same length on every rank, on the wire's device.

    On NCCL the current stream waits, the host does not.
    """
    if wire.backend == "gloo":
        everyone = wire.all_gather_async(vector).wait()
        total = everyone[0].clone()
        for one in everyone[1:]:  # in the order of ranks, on each of them
            total += one
        return Extremes(everyone.amin(0), everyone.amax(0), total)
    total, extremes = vector.clone(), torch.cat([vector, -vector])
    for work in (wire.all_reduce(total), wire.all_reduce(extremes, "max")):
        work.wait()
    largest, smallest = extremes.chunk(2)
    return Extremes(-smallest, largest, total)


class Outcome(NamedTuple):
    """What a step has come to on all ranks together.

    Attributes:
        squares: the sum of the ranks' squares.
        nonfinite: how many ranks met an infinite or NaN gradient.
        culprit: that rank, if it was one alone.
        tokens: the sum.
        stop: how many ranks wish to stop.
        used: for each parameter, on how many ranks it took part.
        loss: the sum.
    """

    squares: float
    nonfinite: int
    culprit: int | None
    tokens: int
    stop: int
    used: list[int]
    loss: float = 0.0


class Control:
    """What a step sends, and how it is read.

    Args:
        wire: to the other ranks.
        parameters: how many there are.
        agreed: the names of the whole numbers on which the ranks have to agree, as an error names them.
        across: to the same place in the other stages of a pipeline, whose parameters are others: sums are of all stages
            then, and the first of the numbers is compared between them.
        number: by which errors call this rank; None: its place in the wire.
        ties: of parameters that lie on several stages: the index of each here, or None, in an order that all stages
            share.

    Example:
        control = Control(wire, parameters=2, agreed=("step", "buckets"))
        pending = control.send([7, 3], squares=2.5, used=[True, False])
        outcome = pending.read()            # or a step later
    """

    def __init__(self, wire: Wire, parameters: int = 0, agreed: Sequence[str] = ("step", "buckets"),
                 across: Wire | None = None, number: int | None = None, ties: Sequence[int | None] = ()):
        self.wire, self.parameters, self.agreed = wire, parameters, tuple(agreed)
        self.across, self.ties = across, tuple(ties)
        self.number = wire.rank if number is None else number
        self.base = wire.size + 1  # of the numeral system in which counts of ranks share a float64
        self.digits = int(53 * math.log(2) / math.log(self.base) + 1e-9)
        self.powers = torch.tensor([self.base**i for i in range(self.digits)], dtype=torch.float64)

    def send(self, agreed: Sequence[int], squares: float | Tensor = 0.0, nonfinite: bool | Tensor = False,
             tokens: int = 0, stop: bool = False, used: Sequence[bool] | Tensor | None = None,
             loss: float | Tensor = 0.0) -> Pending:
        """Send this rank's part of a step. Every rank has to.

        Arguments:
            agreed: a whole number for each name, of 53 bits at most.
            squares, nonfinite, loss: numbers, or tensors of shape () on the wire's device, which the host does not read.
            used: which parameters took part here; None: none.

        Raises:
            ValueError: too few numbers, or one too large; nothing has been sent.
        """
        if len(agreed) != len(self.agreed) or any(abs(number) > EXACT for number in agreed):
            raise ValueError(f"the ranks compare {self.agreed}, each of 53 bits at most; got {list(agreed)}")
        flags = torch.zeros(-(-self.parameters // self.digits) * self.digits, dtype=torch.float64)
        if used is not None:
            flags[:self.parameters] = torch.as_tensor(used, dtype=torch.float64)
        on_host = torch.tensor([*agreed, 0.0, 0.0, 0.0, tokens, stop, 0.0], dtype=torch.float64)
        packed = (flags.view(-1, self.digits) * self.powers).sum(1) if self.parameters else flags
        tied = torch.tensor([0.0 if index is None or used is None else float(used[index]) for index in self.ties],
                            dtype=torch.float64)
        vector = torch.cat([on_host, tied, packed]).to(self.wire.device)
        first = len(self.agreed)
        vector[first] = squares
        vector[first + 1] = nonfinite
        vector[first + 2] = vector[first + 1] * (self.number + 1)
        vector[first + 5] = loss
        here = control(self.wire, vector)
        return Pending(self, list(agreed), here, None if self.across is None else self._over_stages(here))

    def _over_stages(self, here: Extremes) -> Extremes:
        """Along the pipeline: the first number, whether a stage has come apart, and the sums."""
        assert self.across is not None
        first = len(self.agreed)
        apart = (here.min[:first] != here.max[:first]).any().double()
        return control(self.across, torch.cat([here.max[:1], apart.view(1), here.sum[first : first + self.sums]]))

    @property
    def sums(self) -> int:
        """How many numbers are added up, those of parameters left out."""
        return len(SUMMED) + len(self.ties)


class Pending:
    """A step's control under way.

    Attributes:
        squares, nonfinite, tokens, stop, loss: of all ranks, on the wire's device, for what the step needs there.
    """

    def __init__(self, owner: Control, mine: list[int], here: Extremes, stages: Extremes | None = None):
        self.owner, self.mine = owner, mine
        first = len(owner.agreed)
        sums = here.sum[first : first + owner.sums] if stages is None else stages.sum[2:]
        self.squares, self.nonfinite = sums[0], sums[1] != 0
        self.tokens, self.stop, self.loss = sums[3:6]
        between = here.sum[:0] if stages is None else torch.cat([stages.min[:1], stages.max[:1], stages.sum[1:2]])
        self._numbers = torch.cat([here.min[:first], here.max[:first], between, sums, here.sum[first + owner.sums :]])
        self._between = len(between)
        self._arrived = None
        if self._numbers.is_cuda:
            self._numbers = self._numbers.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.current_stream().record_event()

    def read(self) -> Outcome:
        """On the host. On a GPU it waits for the device to come so far: read it a step later.

        Raises:
            Disagreement: the same on every rank: what each of them has for what ought to be equal.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        first, owner = len(self.owner.agreed), self.owner
        lowest, highest, between, rest = self._numbers.tensor_split([first, 2 * first, 2 * first + self._between])
        if not torch.equal(lowest, highest) or (len(between) and (between[0] != between[1] or between[2])):
            raise Disagreement(self._told(torch.equal(lowest, highest)))
        squares, nonfinite, culprit, tokens, stop, loss = rest[:len(SUMMED)].tolist()
        used = [count for number in rest[owner.sums:].tolist() for count in self._counts(int(number))]
        for index, count in zip(owner.ties, rest[len(SUMMED) : owner.sums].tolist(), strict=True):
            if index is not None:
                used[index] = int(count)
        return Outcome(squares, int(nonfinite), int(culprit) - 1 if nonfinite == 1 else None, int(tokens), int(stop),
                       used[:owner.parameters], loss)

    def _counts(self, number: int) -> list[int]:
        return [number // self.owner.base**i % self.owner.base for i in range(self.owner.digits)]

    def _told(self, alike: bool) -> str:
        """What differs, in words: in this stage, or, where there are others, in all, the same on all their ranks."""
        owner, told = self.owner, None
        if not alike:
            everyone = [json.loads(text) for text in owner.wire.gather_objects_json(json.dumps(
                [owner.number, self.mine]))]
            told = different(owner.agreed, [numbers for _, numbers in everyone], [rank for rank, _ in everyone])
        if owner.across is None:
            return str(told)
        stages = [json.loads(text) for text in owner.across.gather_objects_json(json.dumps(
            [owner.number, self.mine[:1], told]))]
        if any(text for *_, text in stages):
            return "; ".join(text for *_, text in stages if text)
        return different(owner.agreed[:1], [step for _, step, _ in stages], [rank for rank, *_ in stages])


def different(names: Sequence[str], numbers: Sequence[Sequence[int]], ranks: Sequence[int] | None = None) -> str:
    """The ranks' numbers that differ, in words; `ranks`: what the ranks are called.

    Example:
        >>> different(("step", "buckets"), [[7, 3], [7, 3], [7, 2]])
        'the ranks have come apart: buckets is 3 on ranks 0 and 1 and 2 on rank 2'
    """
    told = []
    for place, name in enumerate(names):
        holders: dict[int, list[str]] = {}
        for rank, mine in enumerate(numbers):
            holders.setdefault(mine[place], []).append(str(ranks[rank] if ranks else rank))
        if len(holders) > 1:
            told.append(f"{name} is " + " and ".join(
                f"{number} on rank{'s' * (len(those) > 1)} {_and(those)}" for number, those in holders.items()))
    return f"the ranks have come apart: {'; '.join(told)}"


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
