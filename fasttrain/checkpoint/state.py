"""A whole state: its entries, what a rank writes of them, and how they are loaded."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch
from torch import nn

from fasttrain import __version__
from fasttrain.checkpoint import encoding
from fasttrain.checkpoint.names import Named
from fasttrain.checkpoint.of_model import OfModel
from fasttrain.checkpoint.of_object import OfObject, OfValue, is_object
from fasttrain.checkpoint.of_optimizer import OfOptimizer
from fasttrain.checkpoint.parts import Part, mine, need_memory
from fasttrain.checkpoint.place import Place
from fasttrain.checkpoint.problems import Problem
from fasttrain.checkpoint.saved import Plan, Saved, given, refuse, whole_reads
from fasttrain.checkpoint.stages import Held, is_away, together
from fasttrain.checkpoint.together import STAGE

Entry = OfModel | OfOptimizer | OfObject | OfValue


class Mismatch(ValueError):
    """A checkpoint is not of this state: of another model, optimizer or storage. Nothing was changed.

    Attributes:
        problems: one line each.
    """

    def __init__(self, where: str, problems: Iterable[str]):
        self.problems = problems = list(problems)
        super().__init__(f"{where} cannot be loaded into this state:\n  " + "\n  ".join(problems))


def entries(state: Mapping[str, Any], place: Place) -> dict[str, Entry]:
    """The entries of a state, by their keys.

    Raises:
        TypeError, ValueError: a key that is no plain name; parameters without names.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"a state is a dict by keys of your choice, not a {type(state).__name__}: "
                        '{"model": model, "optimizer": optimizer}')
    for key in state:
        if not isinstance(key, str) or not key or "/" in key:
            raise ValueError(f"{key!r} is no key of a state: give a text without '/'")
    models = {key: value for key, value in state.items() if isinstance(value, nn.Module)}
    named = Named(models)
    found: dict[str, Entry] = {}
    for key, value in state.items():
        if isinstance(value, nn.Module):
            found[key] = OfModel(key, value, place.stage)
        elif isinstance(value, torch.optim.Optimizer):
            found[key] = OfOptimizer(key, value, named.of(value, key), place.stage, place.number)
        elif is_object(value):
            found[key] = OfObject(key, value, place.rank, place.everyone, place.number, place.stages)
        else:
            found[key] = OfValue(key, value, place.rank, place.everyone)
    return found


def held(found: Mapping[str, Entry]) -> Held:
    """What this rank's stage of a pipeline holds of a state."""
    return together(entry.held() for entry in found.values())


def entered(state: Mapping[str, Any], place: Place) -> dict[str, Entry]:
    """`entries`, when parameters that are on their way to this rank have arrived (`Zero(..., overlap=True)`)."""
    found = entries(state, place)
    for value in state.values():
        if isinstance(value, torch.optim.Optimizer) and hasattr(value, "gather"):
            value.gather()
    return found


def out(found: Mapping[str, Entry], place: Place, away: Set[str] = frozenset()) -> tuple[list[Part], dict[str, Any]]:
    """What this rank writes of a state: its parts, and its tree of values.

    Arguments:
        found: its entries, `entered`.
        away: addresses that another stage of the pipeline writes.

    Raises:
        TypeError, ValueError: something cannot be kept; which, and why.
    """
    parts: list[Part] = []
    told: dict[str, Any] = {}
    with torch.no_grad():
        for key, entry in found.items():
            own, told[key] = entry.save()
            parts += own
    for part in parts:
        need_memory(part.name, part.memory)
        _ = part.dtype  # raises where there is none for it
    stage = {STAGE: place.number} if place.leads and (place.stages > 1 or place.rank > 0) else {}
    return mine([part for part in parts if not is_away(part, away)]), {
        "entries": told, **stage, "versions": {"fasttrain": __version__, "torch": str(torch.__version__),
                                               "python": platform.python_version()}}


def plans(found: Mapping[str, Entry], saved: Saved, elsewhere: Set[str]) -> tuple[list[Plan], list[Problem]]:
    """How a state would be loaded, in the order in which that has to be done; and why it cannot be.

    Arguments:
        found: its entries.
        elsewhere: addresses that other stages of a pipeline hold.
    """
    made = []
    with torch.no_grad():
        for key, entry in found.items():
            if not isinstance(entry, OfValue):
                made.append(entry.plan(saved, elsewhere))
            elif (saved.entry(key) or {}).get("kind") != "value":
                made.append(refuse(f"{key}: the checkpoint has no value of this name"))
    made.append(Plan([], whole_reads(_values(saved), saved), lambda: None))
    return sorted(made, key=lambda plan: plan.order), [line for plan in made for line in plan.problems]


def values(saved: Saved) -> dict[str, Any]:
    """Every plain value of a checkpoint, as the first rank had it."""
    return {key: encoding.decode(told, given(saved)) for key, told in _values(saved).items()}


def _values(saved: Saved) -> dict[str, Any]:
    return {key: told["value"] for key, told in saved.source.values(0).get("entries", {}).items()
            if isinstance(told, Mapping) and told.get("kind") == "value"}
