"""Why a checkpoint cannot be loaded, as ranks tell one another and as people read it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

LISTED = 20  # names in an error


class Problem(NamedTuple):
    """One reason, and the names that it is about, of which other ranks may have others.

    Example:
        >>> str(Problem("model: missing in the checkpoint", ("head.weight (2, 2)", "head.bias (2,)")))
        'model: missing in the checkpoint: head.weight (2, 2), head.bias (2,)'
    """

    what: str
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.what}: {listed(self.names)}" if self.names else self.what


def combined(of_ranks: Iterable[Iterable[Sequence]]) -> list[str]:
    """A line for each reason, with the names of all ranks, each once: what one process with all of it would say.

    Arguments:
        of_ranks: of each rank its problems, or what JSON has made of them.

    Example:
        >>> combined([[Problem("missing", ("a",))], [["missing", ["b", "a"]], ["no optimizer", []]]])
        ['missing: a, b', 'no optimizer']
    """
    names: dict[str, dict[str, None]] = {}
    for problems in of_ranks:
        for what, some in problems:
            names.setdefault(what, {}).update(dict.fromkeys(some))
    return [str(Problem(what, tuple(some))) for what, some in names.items()]


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
