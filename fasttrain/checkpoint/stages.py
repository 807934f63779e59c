"""What the stages of a pipeline tell one another: which names they hold, and who writes what several of them hold.

A weight that is tied across stages (the embedding and the head), and all states of it, are held by several stages; they
are written by one of them. Whether a name is missing or unexpected is a question to all stages together.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Set
from typing import NamedTuple

import torch

from fasttrain.checkpoint.parts import Part
from fasttrain.checkpoint.place import Place

CANNOT = 2.0  # of a rank whose state cannot be saved; 1: it is another than at the last save; 0: it is not


class Held(NamedTuple):
    """What a stage holds of a state, alike on all of its ranks.

    Attributes:
        tensors: by address ``"model/blocks.0.weight"``, or ``"optimizer/blocks.0.weight"`` of all states of this one:
            bytes of the whole.
        others: addresses that tensors have beside their first.
    """

    tensors: dict[str, int]
    others: list[str]

    def names(self) -> set[str]:
        return {*self.tensors, *self.others}


def together(some: Iterable[Held]) -> Held:
    """All of it."""
    tensors: dict[str, int] = {}
    others: list[str] = []
    for one in some:
        tensors |= one.tensors
        others += one.others
    return Held(tensors, others)


def elsewhere(place: Place, held: Held) -> frozenset[str]:
    """The addresses that other stages hold; a collective."""
    if place.stages == 1:
        return frozenset()
    return frozenset(name for number, other in _told(place, held).items() if number != place.number
                     for name in other.names())


def _told(place: Place, held: Held) -> dict[int, Held]:
    """What each stage holds."""
    texts = place.line.gather_objects_json(json.dumps([place.number, *held]))
    return {number: Held(tensors, others) for number, tensors, others in map(json.loads, texts)}


def writers(stages: Mapping[int, Mapping[str, int]]) -> dict[str, int]:
    """By address the stage that writes what several hold: the one that has least to write so far, largest first.

    Arguments:
        stages: by number, the bytes of what each holds, by address.

    Example:
        >>> writers({0: {"model/embedding": 8, "model/in": 4}, 1: {"model/embedding": 8}})
        {'model/embedding': 1}
    """
    holders: dict[str, list[int]] = {}
    for number, own in sorted(stages.items()):
        for name in own:
            holders.setdefault(name, []).append(number)
    load = {number: sum(nbytes for name, nbytes in own.items() if len(holders[name]) == 1)
            for number, own in stages.items()}
    found = {}
    shared = [name for name, numbers in holders.items() if len(numbers) > 1]
    for name in sorted(shared, key=lambda name: (-stages[holders[name][0]][name], name)):
        found[name] = number = min(holders[name], key=lambda number: (load[number], number))
        load[number] += stages[number][name]
    return found


class Writers:
    """Who writes what several stages hold: agreed upon at the first save, and whenever a stage holds something else.

    Nothing is sent where there is one stage; else 8 bytes in each save, and the names where they have changed.
    """

    def __init__(self, place: Place):
        self.place = place
        self._last: Held | None = None
        self._away: frozenset[str] = frozenset()

    def away(self, held: Held) -> frozenset[str]:
        """The addresses that this stage holds and another one writes.

        Raises:
            RuntimeError: the state of another rank cannot be saved.
        """
        if self.place.stages == 1:
            return frozenset()
        if (news := self._ask(float(held != self._last))) == CANNOT:
            raise RuntimeError("the state of another rank cannot be saved, and its error says why: nothing is written")
        if news:
            chosen = writers({number: one.tensors for number, one in _told(self.place, held).items()})
            self._away = frozenset(name for name, number in chosen.items()
                                   if name in held.tensors and number != self.place.number)
            self._last = held
        return self._away

    def cannot(self) -> None:
        """Let the others know that this rank's state cannot be saved."""
        if self.place.stages > 1:
            self._ask(CANNOT)

    def _ask(self, news: float) -> float:
        assert self.place.wire is not None
        most = torch.tensor(news, dtype=torch.float64, device=self.place.wire.device)
        self.place.wire.all_reduce(most, "max").wait()
        return most.item()


def is_away(part: Part, away: Set[str]) -> bool:
    """Whether another stage writes a part: of this tensor, or of a state of this parameter."""
    return any(part.name == name or part.name.startswith(f"{name}/") for name in away)
