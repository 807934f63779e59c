"""What goes into a manifest beside tensors: trees of JSON that come back as they were."""

from __future__ import annotations

from typing import Any


def check(value: Any, where: str = "values") -> None:
    """Refuse what JSON would give back as something else, or not at all.

    Infinite numbers and NaN are written as Python's json does (``Infinity``, ``NaN``).

    Raises:
        TypeError: an object is no dict of strings, list, str, int, float, bool or None; which, and where it is.

    Example:
        >>> from fasttrain.checkpoint import tree
        >>> tree.check({"step": 3, "betas": (0.9, 0.99)})
        Traceback (most recent call last):
            ...
        TypeError: values.betas is a tuple: only dict, list, str, int, float, bool and None can be saved as values
    """
    if type(value) is dict:
        for key, inner in value.items():
            if type(key) is not str:
                raise TypeError(f"{where} has the key {key!r}: keys of values are strings")
            check(inner, f"{where}.{key}")
    elif type(value) is list:
        for index, inner in enumerate(value):
            check(inner, f"{where}[{index}]")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise TypeError(f"{where} is a {type(value).__name__}: only dict, list, str, int, float, bool and None can be "
                        f"saved as values")
