"""What an evaluation returned, as numbers of the host; and whether there will be any."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from typing import Any

Record = dict[str, Any]


def measured(given: Any, needed: str | None = None) -> Record:
    """The numbers of an evaluation, as JSON holds them: those of tensors and of numpy are read.

    Arguments:
        needed: a guard looks at the one of this name.

    Raises:
        TypeError: it is no dict of numbers.
        KeyError: `needed` is not among them.

    Example:
        >>> import torch
        >>> measured({"loss": torch.tensor(2.5), "bytes": 10})
        {'loss': 2.5, 'bytes': 10}
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"evaluate returned {given!r:.80}: it must return a dict of numbers, {{'loss': 2.5}}, say")
    found = {str(name): _number(str(name), value) for name, value in given.items()}
    if needed is not None and needed not in found:
        raise KeyError(f"evaluate returned {', '.join(found) or 'nothing'}, and no {needed!r}, which a guard or "
                       "schedule looks at: return it, or name another with metric=")
    return found


def _number(name: str, value: Any) -> int | float:
    if getattr(value, "size", None) is not None and hasattr(value, "item") and hasattr(value, "dtype"):
        elements = value.numel() if hasattr(value, "numel") else value.size
        value = value.item() if elements == 1 else value
    if not isinstance(value, numbers.Real):
        raise TypeError(f"evaluate returned {name}={value!r:.80}, which is no number")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def check_evaluations(evaluate: Any, every: int, asked: Iterable[Any]) -> None:
    """Refuse evaluations that would never be made, or that somebody asks for and nobody makes.

    Arguments:
        asked: what looks at evaluations, or None.

    Raises:
        ValueError: says which.
    """
    if (evaluate is not None) != (every > 0):
        raise ValueError(f"evaluate={evaluate!r} with evaluate_every={every}: nothing would be evaluated; give both")
    if evaluate is None and any(one is not None for one in asked):
        raise ValueError("early, gap and a plateau are asked after an evaluation: give evaluate and evaluate_every")


def check_whole(**options: Any) -> None:
    """Refuse options that are no whole numbers of at least 1.

    Raises:
        ValueError: the first of them.
    """
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
