"""How the details of two fingerprints differ, in a few lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

MOST = 12  # lines
MOST_NAMES = 6
LONGEST = 100  # characters of a value or a name
ABSENT = "(absent)"

Details = Mapping[str, Any]
Line = Callable[[str, Any, Any], str]  # of what differs, and both values


def of(one: Details, other: Details, here: str, there: str) -> list[str]:
    """Lines that tell how details differ, what explains more first; at least one, and no more than `MOST` + 1.

    Arguments:
        here, there: whose details these are: "rank 3".
    """
    def line(what: str, mine: Any, theirs: Any) -> str:
        return f"{what}: {_short(mine)} on {here}, {_short(theirs)} on {there}"

    lines = [line("versions" + path, *pair) for path, *pair in _unequal(one["versions"], other["versions"])]
    if one["format"] != other["format"]:
        return [*lines, line("format of the fingerprint", one["format"], other["format"])]
    lines += [line("mesh", one["mesh"], other["mesh"])] if one["mesh"] != other["mesh"] else []
    lines += [line("options" + path, *pair) for path, *pair in _unequal(one["options"], other["options"])]
    reordered, about_parameters = _of_parameters(one["parameters"], other["parameters"], here, there, line)
    lines += about_parameters
    ours, theirs = one["layout"], other["layout"]
    for part in ("format", "worlds", "options"):
        lines += [line(f"layout.{part}{path}", *pair) for path, *pair in _unequal(ours[part], theirs[part])]
    if set(ours["order"]) == set(theirs["order"]) and not reordered:
        lines += _first("the order of gradients", ours["order"], theirs["order"], line)
    if not lines:  # else it follows from what is told already
        lines = [line("layout" + path, *pair) for path, *pair in _unequal(ours, theirs)]
    return lines if len(lines) <= MOST else [*lines[:MOST], f"and {len(lines) - MOST} differences more"]


def _of_parameters(mine: Sequence[Details], theirs: Sequence[Details], here: str, there: str,
                   line: Line) -> tuple[bool, list[str]]:
    """Whether they come in another order, and all that is to tell of them."""
    ours, others = ({entry["name"]: entry for entry in entries} for entries in (mine, theirs))
    lines = []
    for names, where, not_where in (([name for name in ours if name not in others], here, there),
                                    ([name for name in others if name not in ours], there, here)):
        if names:
            shown = ", ".join(_short(name) for name in names[:MOST_NAMES])
            rest = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
            lines.append(f"parameters on {where} and not on {not_where}: {shown}{rest}")
    both = [name for name in others if name in ours]
    moved = _first("the order of parameters", [name for name in ours if name in others], both, line)
    lines += moved
    for name in both:
        one, other = ours[name], others[name]
        for fact in ("shape", "stride", "dtype", "device", "group", "requires_grad"):
            if one[fact] != other[fact] and not (fact == "stride" and one["shape"] != other["shape"]):
                lines.append(line(f"parameter {_short(name)}: {fact}", one[fact], other[fact]))
    return bool(moved), lines


def _first(what: str, mine: Sequence[str], theirs: Sequence[str], line: Line) -> list[str]:
    """The first place at which two orders of the same names differ."""
    places = [place for place, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1]]
    return [line(f"{what}, at {len(places)} places, first at {place}", mine[place], theirs[place])
            for place in places[:1]]


def _unequal(one: Any, other: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, one's value, the other's) of all that differs, as deep as both have the same kind."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            yield from _unequal(one.get(key, ABSENT), other.get(key, ABSENT), f"{path}.{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for place, pair in enumerate(zip(one, other, strict=True)):
            yield from _unequal(*pair, f"{path}[{place}]")
    elif json.dumps(one) != json.dumps(other):  # 1 is not true, and NaN is NaN
        yield path, one, other


def _short(value: Any) -> str:
    text = ABSENT if value == ABSENT else repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
