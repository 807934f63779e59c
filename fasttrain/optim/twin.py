"""The optimizer on the host that stands beside one whose parameters are on a GPU: made, refused, kept alike."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fasttrain.kernels.link import Link, link_of
from fasttrain.optim.checks import reals
from fasttrain.optim.examine import scan, undone
from fasttrain.optim.local import is_dtensor
from fasttrain.optim.report import StepReport

FORCED = (None, "cpu", "reference")  # backends that step on the host


def parameters(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def places(optimizer: Any) -> list[tuple[int, int]]:
    return [(g, i) for g, group in enumerate(optimizer.param_groups) for i in range(len(group["params"]))]


def links(params: list[Tensor]) -> list[Link | None]:
    """The way to each parameter's device; None for those that are on the host."""
    by_device = {device: link_of(device) for device in {p.device for p in params}}
    return [by_device[p.device] for p in params]


def refuse(optimizer: Any, params: list[Any], to: list[Link | None]) -> None:
    """Raise if something does not go together with offloading."""
    if optimizer.defaults.get("differentiable"):
        raise TypeError("offload=True and differentiable=True do not go together: autograd cannot follow a step that "
                        "is made on the host")
    if optimizer.backend not in FORCED:
        raise TypeError(f"offload=True steps on the host, which backend={optimizer.backend!r} cannot: leave it out")
    for where, p, link in zip(places(optimizer), params, to, strict=True):
        if is_dtensor(p):
            raise TypeError(f"{optimizer._name(where)} is a DTensor, placed {p.placements}: offload=True takes plain "
                            "tensors. Have fully_shard keep the shards on the host (offload_policy=CPUOffloadPolicy()) "
                            "and leave offload out: they are stepped there")
        if link is not None:
            reals(optimizer._name(where), p.detach(), p.detach(), (), {})


def inner(optimizer: Any, twins: list[Tensor]) -> Any:
    """An optimizer of the same class and options for the twins; it has no hooks and no states."""
    made = object.__new__(type(optimizer))
    made.__dict__.update({name: OrderedDict() if "hooks" in name and isinstance(value, dict) else value
                          for name, value in vars(optimizer).items()})
    rest = iter(twins)
    groups = [{**group, "params": [next(rest) for _ in group["params"]]} for group in optimizer.param_groups]
    made.offload, made._host, made.arriving = False, None, None
    made._planned_for, made._places = None, []
    made.__setstate__({"state": defaultdict(dict), "param_groups": groups})
    return made


def give(twin: Tensor, grad: Tensor) -> None:
    """Give a gradient, which may have another dtype."""
    if twin.grad_dtype != grad.dtype:
        twin.grad_dtype = grad.dtype
    twin.grad = grad


def share(giver: list[dict[str, Any]], taker: list[dict[str, Any]]) -> None:
    """Every entry of parameter groups but their parameters."""
    for source, target in zip(giver, taker, strict=True):
        target.update((key, value) for key, value in source.items() if key != "params")


class Fine(Exception):
    """Ends what is to be undone."""


def check(optimizer: Any, gradients: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Raise, before anything is written, where there are states that cannot be stepped.

    Arguments:
        optimizer: of twins.
        gradients: of some twins; in memory of the gradients' own shape and order, whatever is in it.
    """
    given = dict(gradients)
    versions = dict(optimizer._versions)  # by which an examination sees, once, that a parameter was written outside
    planned = [] if optimizer._plan is None else [optimizer._plan.version(i) for i in range(len(optimizer._places))]
    rules = [optimizer.rule_of(group) for group in optimizer.param_groups]
    try:
        for twin, grad in given.items():
            give(twin, grad)
        with undone(optimizer) as examining:
            for index in scan(optimizer, rules):
                where = optimizer._places[index]
                twin = optimizer._param(where)
                if index < len(planned) and planned[index] >= 0:
                    versions.setdefault(id(twin), planned[index])
                if optimizer.state.get(twin):
                    examining(twin)
                    optimizer._examine(where, rules[where[0]], StepReport())
            raise Fine  # what was made is made again when it is stepped
    except Fine:
        pass
    finally:
        optimizer._versions = versions
        for twin in given:
            twin.grad = None
        if optimizer._plan is not None:
            optimizer._plan.release()
