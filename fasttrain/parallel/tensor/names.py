"""Which modules of a model the patterns of a plan mean."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn


def matches(name: str, pattern: str) -> bool:
    """Whether a module's name is meant: each part between dots by itself, as torch's `parallelize_module` takes them.

    Example:
        >>> matches("blocks.3.qkv", "blocks.*.qkv"), matches("blocks.3.attention.qkv", "blocks.*.qkv")
        (True, False)
    """
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def resolved(model: nn.Module, plan: Mapping[str, Any], model_name: str) -> dict[str, tuple[str, Any]]:
    """For each module that is meant, in the order of the model, the pattern and what the plan says.

    Raises:
        ValueError: a pattern means no module, or two say different things about one.
    """
    found: dict[str, tuple[str, Any]] = {}
    by_module: dict[int, str] = {}
    unused = dict(plan)
    for name, module in model.named_modules(remove_duplicate=False):
        for pattern, wanted in plan.items():
            if not matches(name, pattern):
                continue
            unused.pop(pattern, None)
            said, before = found.get(by_module.setdefault(id(module), name), (pattern, wanted))
            if before != wanted:
                raise ValueError(f"the plan contradicts itself: {name or 'the model'} is {shown(before)} by {said!r} "
                                 f"and {shown(wanted)} by {pattern!r}: leave one of them out")
            found.setdefault(by_module[id(module)], (pattern, wanted))
    if unused:
        raise ValueError(missing(model, list(unused), model_name))
    return found


def missing(model: nn.Module, patterns: list[str], model_name: str) -> str:
    """The message about patterns that mean no module, with the names that are most like them."""
    names = [name for name, _ in model.named_modules() if name]
    stars = {".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names}
    known = list(dict.fromkeys([*names, *sorted(stars)]))
    lines = []
    for pattern in patterns:
        near = difflib.get_close_matches(pattern, known, 3, 0.5) or names[:3]
        lines.append(f"{pattern!r} is the name of no module of {model_name}; "
                     + (f"there are {', '.join(near)}" if near else "it has none inside"))
    return "the plan does not fit the model: " + "; ".join(lines) + ". Names are those of model.named_modules()"


def shown(wanted: Any) -> str:
    """A style as errors call it."""
    return f'"{wanted}"' if isinstance(wanted, str) else type(wanted).__name__
