"""Parameters of which several stages have a copy: embeddings tied to the head, and what every stage uses.

The copies are one parameter of the whole model. They begin equal and get the same gradient, the sum over the stages
that use them, so they stay equal; in norms they count once, and in checkpoints they have one name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn


class Tie(NamedTuple):
    """One parameter of the whole model, held at several places along the pipeline.

    Attributes:
        name: the one that it has in norms and checkpoints: the first in the order of the whole model.
        ranks: the places along the axis "pipeline" that hold a copy, ascending; the first of them counts it.
        here: its name on this rank; None: it is not held here.
    """

    name: str
    ranks: tuple[int, ...]
    here: str | None


def aliases(model: nn.Module) -> dict[str, str]:
    """By each name of a parameter of a whole model the first name of the same parameter.

    Example:
        >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> b.weight = a.weight
        >>> aliases(nn.Sequential(a, b))["1.weight"]
        '0.weight'
    """
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}


def modules(model: nn.Module) -> dict[str, tuple[type[nn.Module], ...]]:
    """By the first name of each parameter of a whole model the classes of all modules that have it."""
    first, found = aliases(model), dict[str, tuple[type[nn.Module], ...]]()
    for place, module in model.named_modules():
        for name, _ in module.named_parameters(place, recurse=False):
            found[first[name]] = (*found.get(first[name], ()), type(module))
    return found


def found(first: Mapping[str, str], held: Sequence[Sequence[str]], here: int) -> list[Tie]:
    """All ties of a model, in one order on every rank.

    Arguments:
        first: see `aliases`.
        held: the names held at each place along the pipeline.
        here: the place of this rank.

    Example:
        >>> found({"rows": "rows", "block": "block", "head": "rows"}, [["rows"], ["block", "head"]], 1)
        [Tie(name='rows', ranks=(0, 1), here='head')]
    """
    places: dict[str, list[int]] = {}
    for place, names in enumerate(held):
        for name in dict.fromkeys(first[name] for name in names):
            places.setdefault(name, []).append(place)
    mine: dict[str, str] = {}
    for name in held[here]:
        mine.setdefault(first[name], name)
    return [Tie(name, tuple(ranks), mine.get(name)) for name, ranks in places.items() if len(ranks) > 1]
