"""Where a loader is: the number of the next sample, and the numbers that never come again."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np

from fasttrain.data.errors import DataError, WrongState

Runs = list[tuple[int, int]]  # first number, and how many


class Position:
    """One integer and a skip list.

    Example:
        >>> position = Position(index=4)
        >>> position.skip(6, 100)
        >>> position.take(4)
        [(4, 2), (106, 2)]
        >>> position.index
        108
    """

    def __init__(self, index: int = 0, skipped: Sequence[Sequence[int]] = ()):
        self.index = index
        self.skipped: Runs = []  # disjoint, ascending
        for first, count in skipped:
            self.skip(first, count)

    def copy(self) -> Position:
        return Position(self.index, self.skipped)

    def skip(self, first: int, count: int) -> None:
        """Leave out these numbers from now on.

        Raises:
            DataError: negative numbers.
        """
        if first < 0 or count < 0:
            raise DataError(f"skip({first}, {count}): numbers of samples, and how many, are not negative")
        merged: Runs = []
        for begin, length in sorted([*self.skipped, (first, count)]):
            if merged and begin <= sum(merged[-1]):
                merged[-1] = (merged[-1][0], max(sum(merged[-1]), begin + length) - merged[-1][0])
            elif length:
                merged.append((begin, length))
        self.skipped = merged

    def take(self, count: int) -> Runs:
        """The next `count` numbers, in runs; the position is behind them then."""
        runs: Runs = []
        number = bisect_right(self.skipped, (self.index, 0)) - 1  # the last gap that begins before
        if number >= 0:
            self.index = max(self.index, sum(self.skipped[number]))
        while count:
            number += 1
            begin, length = self.skipped[number] if number < len(self.skipped) else (self.index + count, 0)
            if taken := min(count, begin - self.index):
                runs.append((self.index, taken))
                count -= taken
                self.index += taken
            if count:
                self.index = begin + length
        return runs


def slice_of(runs: Runs, rank: int, world: int) -> Runs:
    """Of the numbers in runs, cut into `world` equal parts, the one of `rank`."""
    share = sum(count for _, count in runs) // world
    begin, end, place, found = rank * share, (rank + 1) * share, 0, []
    for first, count in runs:
        low, high = max(begin, place), min(end, place + count)
        if low < high:
            found.append((first + low - place, high - low))
        place += count
    return found


def numbers(runs: Runs) -> np.ndarray:
    """The numbers in runs, each: int64."""
    return np.concatenate([np.arange(first, first + count) for first, count in runs])


def reconcile(state: dict[str, Any], fingerprint: dict[str, Any], batch_size: int,
              remap: bool) -> tuple[Position, list[str]]:
    """The position of a saved state in this data, and what to tell the user about it.

    Raises:
        WrongState: it is no state of a loader, or of other samples and `remap` is not set.
    """
    try:
        position = Position(int(state["index"]), state["skipped"])
        saved, before = state["fingerprint"], int(state["batch_size"])
        changed = [f"{key} {_short(saved.get(key))} instead of {_short(fingerprint.get(key))}"
                   for key in sorted({*saved, *fingerprint}) if saved.get(key) != fingerprint.get(key)]
    except (KeyError, TypeError, ValueError, AttributeError, DataError) as error:
        raise WrongState(f"this is not the state of a loader: {error!r}; it has index, skipped, batch_size and "
                         f"fingerprint") from error
    said = []
    if changed:
        what = ", ".join(changed)
        if not remap:
            raise WrongState(f"the state was saved with {what}: its samples are not those of this loader. Go on with "
                             f"the same data and options, or load it with remap=True to go on in the new order after "
                             f"as many tokens")
        old, new = saved.get("length") or 1, fingerprint.get("length") or 1
        said.append(f"the state was saved with {what}: going on in the new order, where some samples of the present "
                    f"pass may come again and others not at all")
        if position.skipped:
            said.append(f"{sum(count for _, count in position.skipped)} numbers that were skipped named other samples: "
                        f"they are skipped no longer")
        position = Position(-(-position.index * old // new))
    if before != batch_size:
        said.append(f"batches have {batch_size} samples now and had {before}: going on at sample {position.index}, as "
                    f"batch {position.index / batch_size:g} of this size")
    return position, said


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 200 else text[:197] + "..."
