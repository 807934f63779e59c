"""The copies of a parameter on several stages of a pipeline are stepped alike, or no optimizer steps them.

Each stage makes its own optimizer. Copies that begin equal and get equal gradients stay equal only if the options of
their groups are the same, so these are compared before an optimizer's first step.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from fasttrain.dist.wire import Wire

OWN = ("params", "param_names")  # of a group: not its options

_tied: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of parameters: the wire between their holders, and their name
_compared: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
_hook: Any = None


def watch(wire: Wire, stage: int, named: Sequence[tuple[str, Tensor]]) -> None:
    """Compare the groups of these parameters before an optimizer first steps them.

    Arguments:
        wire: between the ranks that have them.
        stage: of this rank.
        named: by their names in the whole model.
    """
    global _hook
    for name, p in named:
        _tied[p] = wire, stage, name
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_before)


def _before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if optimizer in _compared:
        return
    wires: dict[int, tuple[Wire, int, dict[str, Any]]] = {}
    for group in optimizer.param_groups:
        for wire, stage, name in (known for p in group["params"] if (known := _tied.get(p)) is not None):
            options = {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items()
                       if key not in OWN}
            wires.setdefault(id(wire), (wire, stage, {}))[2][name] = {"optimizer": type(optimizer).__name__, **options}
    for wire, stage, given in sorted(wires.values(), key=lambda one: one[0].ranks):
        compare([json.loads(text) for text in wire.gather_objects_json(json.dumps([stage, given], default=repr))])
    _compared.add(optimizer)


def compare(told: Sequence[tuple[int, Mapping[str, Mapping[str, Any]]]]) -> None:
    """Raise if copies are to be stepped differently.

    Arguments:
        told: of each rank its stage, and by the names of parameters the options of their groups.

    Raises:
        ValueError: they are; the same text on every rank.

    Example:
        >>> compare([(0, {"rows": {"lr": 0.1}}), (1, {"rows": {"lr": 0.2}})])
        Traceback (most recent call last):
            ...
        ValueError: rows has copies on several stages, which would drift apart: the optimizer of stage 0 has lr=0.1 ...
    """
    first_stage, first = told[0]
    for stage, given in told[1:]:
        for name in (name for name in first if name in given):
            here, there = first[name], given[name]
            if differing := [key for key in {**here, **there} if here.get(key) != there.get(key)]:
                said = [", ".join(f"{key}={options.get(key)}" for key in differing) for options in (here, there)]
                raise ValueError(f"{name} has copies on several stages, which would drift apart: the optimizer of "
                                 f"stage {first_stage} has {said[0]} for it, that of stage {stage} {said[1]}. Put them "
                                 "into groups with the same options on each, as fasttrain.guards.decay_groups does")
