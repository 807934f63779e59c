"""Which parameters have made equally many steps, where only the device knows how many."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable

from torch import Tensor


class Cohorts:
    """Step counts on a device in classes of equal ones. Counts that are incremented together stay equal.

    Example:
        >>> import torch
        >>> a, b, c = torch.zeros(3).unbind()
        >>> cohorts = Cohorts()
        >>> cohorts.add([(a, 0.0), (b, 0.0), (c, 7.0)])
        >>> cohorts.of(a) == cohorts.of(b) != cohorts.of(c)
        True
        >>> cohorts.split([a])  # a step without b
        >>> cohorts.of(a) == cohorts.of(b)
        False
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, int]] = {}  # by id; the tensor is kept, so that the id stays its own
        self._made = 0

    def __contains__(self, counter: Tensor) -> bool:
        return id(counter) in self._known

    def of(self, counter: Tensor) -> int:
        return self._known[id(counter)][1]

    def add(self, counters: Iterable[tuple[Tensor, Hashable]]) -> None:
        """Take in counts with what they are equal by now: the values, say. Those that are known keep their class."""
        classes: dict[Hashable, int] = {}
        for counter, value in counters:
            if counter not in self:
                self._known[id(counter)] = counter, classes.setdefault(value, self._new())

    def split(self, stepped: Collection[Tensor]) -> None:
        """Some are incremented and the others are not: no class has both any more."""
        chosen = {id(counter) for counter in stepped}
        left = {number for key, (_, number) in self._known.items() if key not in chosen}
        renamed: dict[int, int] = {}
        for key in chosen:
            counter, number = self._known[key]
            if number in left:
                self._known[key] = counter, renamed.setdefault(number, self._new())

    def _new(self) -> int:
        self._made += 1
        return self._made
