"""The compiled module: the CPU backend. Nothing compiled is imported before it is needed."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fasttrain.kernels import jit
from fasttrain.kernels.emit_cpp import digest
from fasttrain.kernels.item import Item, dense, table_of_rows
from fasttrain.rule import Rule


@cache
def build_info() -> dict[str, Any]:
    """What the build recorded: whether and for what it compiled, and why not."""
    path = Path(__file__).parents[1] / "_build_info.json"
    if path.is_file():
        return json.loads(path.read_text())
    return {"native": False, "reason": "fasttrain was not built here; run `pip install .` (or `make install`)",
            "cuda": [], "cuda_reason": "fasttrain was not built here"}


@cache
def load() -> tuple[ModuleType | None, str]:
    """The module, or None and the reason why there is none."""
    try:
        module = importlib.import_module("fasttrain._native")
    except ImportError as error:
        return None, build_info()["reason"] or f"the compiled module cannot be loaded: {error}"
    return module, ""


def module() -> Any:
    """The module; raises where there is none."""
    loaded, reason = load()
    if loaded is None:
        raise RuntimeError(f"fasttrain has no compiled part: {reason}")
    return loaded


def why_not(device: torch.device) -> str | None:
    """Why the CPU backend cannot step tensors on `device`."""
    if device.type != "cpu":
        return f"it steps tensors in CPU memory, not on {device.type}"
    return load()[1] or None


@cache
def reader(sharded: type | None = None) -> Any:
    """Reads tensors through the C functions that torch publishes; and, if `sharded` is DTensor, the local part of such.
    """
    return module().Reader(torch.Tensor.__dlpack_c_exchange_api__, (torch.Tensor, torch.nn.Parameter), sharded)


class Written:
    """Tensors that a step writes at every time: autograd is told in one call."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self.compiled = None if load()[0] is None else module().Written(reader(), self.tensors)

    def increment(self) -> None:
        if self.compiled is not None:
            self.compiled.increment(torch.autograd.graph.increment_version)
        elif self.tensors:
            torch.autograd.graph.increment_version(self.tensors)


@cache
def built_rules() -> dict[tuple[str, int], int]:
    """The number of each rule that was compiled with the module, by name and digest of its equation."""
    return {key: number for number, key in enumerate(module().rules())}


def is_built(rule: Rule) -> bool:
    """Whether that very equation was compiled with the module."""
    return (rule.name, digest(rule)) in built_rules()


@cache
def find(rule: Rule) -> tuple[int | None, str]:
    """The number of a rule in the compiled module, to which it is added if it is not there; or None and why not."""
    return (built_rules()[rule.name, digest(rule)], "") if is_built(rule) else jit.load(rule, module(), build_info())


def number_of(rule: Rule) -> int | None:
    """The number of a rule in the compiled module; None if it has to run on the reference backend."""
    return find(rule)[0]


def step(items: Sequence[Item]) -> None:
    """Step every item, whatever its layout, in one walk. A rule that has no number runs on the reference backend."""
    from fasttrain.kernels import reference

    known = [item for item in items if number_of(item.rule) is not None]
    with dense(known) as walkable:
        work = [(number_of(item.rule), item.dtype == torch.float64, item.tensors, item.counter,
                 None if item.plain else (item.codecs, item.extras, item.zero, item.key, item.place))
                for item in walkable]
        module().step_once(reader(), work, table_of_rows([item.row for item in known]), torch.get_num_threads())
        torch.autograd.graph.increment_version([tensor for item in walkable for tensor in item.written])
    unknown = [item for item in items if number_of(item.rule) is None]
    for rule in {item.rule: None for item in unknown}:
        say_not_compiled(rule.name, find(rule)[1])
    reference.step(unknown)


@cache
def say_not_compiled(name: str, reason: str) -> None:
    """Say once that a rule is slow here."""
    warnings.warn(f"rule {name} is not in the compiled module and could not be compiled: it runs on the slow reference "
                  f"backend. The reason: {reason}", RuntimeWarning, stacklevel=6)
