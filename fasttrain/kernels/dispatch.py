"""Which backend steps a tensor, and why not the others.

``FASTTRAIN_BACKEND`` or an optimizer's ``backend=`` forces one; where that cannot run, it raises with the reason.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from types import ModuleType
from typing import Any

import torch

# In order of preference, with the kinds of device for which each is chosen without being asked for.
BACKENDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cuda": ("fasttrain.kernels.cuda", ("cuda",)),
    "triton": ("fasttrain.kernels.triton", ("cuda", "xpu")),
    "cpu": ("fasttrain.kernels.native", ("cpu",)),
    "reference": ("fasttrain.kernels.reference", ()),
}


def load(name: str) -> ModuleType:
    """The module of a backend: `why_not(device)` and `step(items)`.

    Raises:
        ValueError: there is no such backend.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is none of {', '.join(BACKENDS)}")
    return importlib.import_module(BACKENDS[name][0])


def part(name: str) -> Any:
    """A module of backends' own parts, which import what chooses among them."""
    return importlib.import_module(f"fasttrain.kernels.{name}")


def forced() -> str | None:
    """The backend that the environment asks for."""
    return os.environ.get("FASTTRAIN_BACKEND") or None


def choose(device: torch.device, wanted: str | None = None) -> str:
    """The name of the backend that steps tensors on `device`.

    Arguments:
        wanted: a backend's name, or None for the environment's or the best.

    Raises:
        RuntimeError: the wanted backend cannot run there; the message says why.

    Example:
        >>> import torch
        >>> choose(torch.device("cpu"), "reference")
        'reference'
    """
    wanted = wanted or forced()
    if wanted is not None:
        reason = load(wanted).why_not(device)
        if reason is not None:
            raise RuntimeError(f"backend {wanted!r} was asked for and cannot run: {reason}")
        return wanted
    return _best(device)


@cache
def _best(device: torch.device) -> str:
    for name, (_, kinds) in BACKENDS.items():
        if device.type in kinds:
            reason = load(name).why_not(device)
            if reason is None:
                return name
            if name == "cpu":
                warnings.warn(f"optimizers run on the slow reference backend: {reason}", RuntimeWarning, stacklevel=4)
    return "reference"


def choose_from(table: Mapping[str, Callable[..., Any]], backend: str, device: torch.device) -> Callable[..., Any]:
    """What a backend does a task with, from the table of those that have a function for it.

    For tensors on a GPU Triton, where it can run, stands in for a backend without one; else the reference does.
    """
    if backend not in table:
        in_triton = "triton" in table and device.type != "cpu" and load("triton").why_not(device) is None
        backend = "triton" if in_triton else "reference"
    return table[backend]


def reasons(device: torch.device) -> dict[str, str | None]:
    """For every backend, why it cannot step tensors on `device`, or None if it can."""
    return {name: load(name).why_not(device) for name in BACKENDS}
