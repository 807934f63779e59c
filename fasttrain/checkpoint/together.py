"""What the stages of a pipeline have saved of one entry beside tensors, as one process with all of it would have told.

The first rank of each stage tells. Where there was no pipeline that is the first rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fasttrain.checkpoint import encoding
from fasttrain.checkpoint.saved import Saved, given

STAGE = "stage"  # in the values of a rank that tells: the number of its stage


def tellers(saved: Saved) -> list[int]:
    """The ranks that tell, in the order of stages."""
    marked = [(saved.source.values(rank)[STAGE], rank) for rank in range(saved.world)
              if STAGE in saved.source.values(rank)]
    return [rank for _, rank in sorted(marked)] or [0]


def told_of(saved: Saved, key: str) -> Any:
    """What all stages together tell of an entry; None if nothing."""
    told = [one for rank in tellers(saved) if (one := saved.entry(key, rank)) is not None]
    if len(told) < 2 or not all(isinstance(one, Mapping) and one.get("kind") == told[0].get("kind") for one in told):
        return told[0] if told else None
    if told[0]["kind"] == "model":
        return {**told[0], "same": _union(one.get("same", {}) for one in told),
                "extra": _union(one.get("extra", {}) for one in told)}
    if told[0]["kind"] == "optimizer":
        return {**told[0], "digits": _union(one.get("digits", {}) for one in told),
                "groups": _ordered(_groups([one["groups"] for one in told], saved), saved)}
    return told[0]


def _union(told: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """By name; what several tell, as the first does."""
    found: dict[str, Any] = {}
    for one in told:
        found = {**one, **found}
    return found


def _groups(stages: list[list[Mapping[str, Any]]], saved: Saved) -> list[dict[str, Any]]:
    """The groups of the first stage, each with the parameters that others have in a group of the same options: in that
    of the same number where it has them. What fits into none is a group more.
    """
    found: list[dict[str, Any]] = []
    options: list[Any] = []
    for groups in stages:
        first = not found
        for number, group in enumerate(groups):
            own = encoding.decode(group["options"], given(saved))
            fits = [place for place, one in enumerate(options) if encoding.same(one, own)] if not first else []
            if fits:
                home = found[number if number in fits else fits[0]]
                home["names"] += [name for name in group["names"] if name not in home["names"]]
            elif first or group["names"]:
                found.append({**group, "names": list(group["names"])})
                options.append(own)
    return found


def _ordered(groups: list[dict[str, Any]], saved: Saved) -> list[dict[str, Any]]:
    """The groups with their parameters in the order of the whole model, where stages have told it.

    A rank with several stages has parameters that do not follow one another.
    """
    stages: dict[int, list[str]] = {}
    for rank in tellers(saved):
        for told in saved.source.values(rank).get("entries", {}).values():
            if isinstance(told, Mapping) and told.get("kind") == "model":
                for number, names in told.get("stages", ()):
                    stages.setdefault(number, []).extend(names)
    order: dict[str, int] = {}
    for number in sorted(stages):
        for name in stages[number]:
            order.setdefault(name, len(order))
    return [{**group, "names": sorted(group["names"], key=lambda name: order.get(name, len(order)))}
            for group in groups]
