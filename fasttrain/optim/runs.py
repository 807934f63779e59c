"""The last two phases of a step: rows of coefficients, and the runs that read them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrain.kernels import dispatch, reference
from fasttrain.kernels.item import Item, in_turns, table_of_rows
from fasttrain.optim import clip
from fasttrain.optim.examine import Examined, advanced
from fasttrain.optim.groups import Groups
from fasttrain.optim.local import is_dtensor, version
from fasttrain.optim.page import Group
from fasttrain.optim.report import StepReport
from fasttrain.precision import draws
from fasttrain.rule import Rule


def key_of(group: Group) -> int:
    """The key of this step's random draws in a group."""
    return draws.step_key(group.get("seed", 0), int(group["draws"])) if "draws" in group else 0


def walk_of_plan(optimizer: Groups, rules: list[Rule], scale: float) -> Callable[[StepReport], None] | None:
    """What steps the parameters that are in the plan."""
    if optimizer._plan is None:
        return None
    each = any(group.get("clip_each") is not None for group in optimizer.param_groups)
    at = optimizer._plan.rows(each)
    if not at:
        return None
    scales = [scale] * len(at)
    if each:
        squares, _ = optimizer._plan.squares(torch.get_num_threads())
        limits = [optimizer.param_groups[group].get("clip_each") for group, _, _ in at]
        scales = [scale * clip.coefficient(abs(scale) * math.sqrt(square), limit)
                  for square, limit in zip(squares, limits, strict=True)]
    numbered = [advanced(optimizer, optimizer._places[first], step) for _, step, first in at]
    rows = [optimizer._row(rules[number], group, step, own)
            for (number, step, _), (group, _, _), own in zip(at, numbered, scales, strict=True)]
    keys = np.array([key_of(group) for group, _, _ in numbered], np.uint64)
    replaced = [tuple(after) for _, _, after in numbered]

    def walk(report: StepReport) -> None:
        optimizer._plan.run(table_of_rows(rows), keys, torch.get_num_threads(),
                            torch.autograd.graph.increment_version, replaced)
        done = optimizer._plan.last
        report.launches += 1 + each
        report.parameters += done["parameters"]
        report.bytes_read += done["bytes_read"]
        report.bytes_written += done["bytes_written"]
    return walk


def runs_of_items(optimizer: Groups, examined: list[Examined], scale: float,
                  report: StepReport) -> list[Callable[[], None]]:
    """What steps the parameters that are not in the plan, each on the backend of its device."""
    by_backend: dict[str, list[Item]] = {}
    runs: list[Callable[[], None]] = []
    watched, wholes = [], []
    for one in examined:
        group, p = one.group, optimizer._param(one.where)
        own = scale * clip.coefficient_of_one(p, abs(scale), group.get("clip_each"))
        if optimizer.defaults.get("differentiable"):
            scalars = one.item.rule.scalars(int(one.step), group)
            item = replace(one.item, row=optimizer._row(one.item.rule, group, one.step, own) if one.kept else ())
            runs.append(partial(reference.write, item, -own if group.get("maximize") else own, scalars))
            continue
        backend = dispatch.choose(one.item.tensors[0].device, optimizer.backend)
        key = draws.parameter_key(key_of(group), optimizer._identity(one.where)) if one.kept else 0
        item = replace(one.item, row=optimizer._row(one.item.rule, group, one.step, own), key=key)
        by_backend.setdefault(backend, []).append(item)
        report.count(item)
        if is_dtensor(p):
            wholes.append(p)
        if one.kept is not None and one.kept.extras[0] is not None:
            watched.append(p)
    for backend, chosen in by_backend.items():
        for together in in_turns(chosen):
            runs.append(partial(run, dispatch.load(backend).step, together, report))
    if wholes:  # the kernels have written their local parts; autograd may have saved the wholes
        runs.append(partial(torch.autograd.graph.increment_version, wholes))
    if watched:
        runs.append(partial(remember, optimizer, watched))
    return runs


def run(step: Callable[[Any], int | None], items: Any, report: StepReport) -> None:
    report.launches += step(items) or 1


def remember(optimizer: Groups, watched: list[Tensor]) -> None:
    optimizer._versions.update((id(p), version(p)) for p in watched)
