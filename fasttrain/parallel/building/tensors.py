"""The parameters and buffers of a model by their names in the original one, and how others take their places."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fasttrain.optim.local import is_dtensor, local
from fasttrain.parallel.tensor.partial import declare, declared
from fasttrain.parallel.wrapped import bare, clean_name, inside_of


@dataclass(eq=False)
class Held:
    """A parameter or a buffer, once, wherever it stands.

    Attributes:
        name: in the original model; of tied ones that of the first, or of that which they are tied to in a stage where
            this is not.
        names: all that it has here.
        sites: (module, attribute) of each.
        persistent: a parameter, or a buffer of the state dict.
    """

    name: str
    tensor: Any
    names: list[str] = field(default_factory=list)
    sites: list[tuple[nn.Module, str]] = field(default_factory=list)
    persistent: bool = True

    @property
    def is_parameter(self) -> bool:
        module, attribute = self.sites[0]
        return attribute in module._parameters

    @property
    def on_meta(self) -> bool:
        return local(self.tensor).is_meta

    @property
    def absent(self) -> bool:
        """Whether what it is tied to is in another stage."""
        return self.name not in self.names


def tied_of(model: nn.Module) -> dict[str, str]:
    """Which names are tied to which, by the model itself: its attribute `tied`, what Hugging Face models have, or what
    `fasttrain.parallel.pipeline.split` has found.

    A stage that has lost one of the two knows of it by this alone.
    """
    if hasattr(model, "pipeline_held"):
        from fasttrain.parallel.pipeline.held import names_of_whole

        return names_of_whole(model)
    for attribute in ("tied", "all_tied_weights_keys"):
        if isinstance(found := getattr(model, attribute, None), Mapping):
            return dict(found)
    return {}


def held(model: nn.Module, tied: Mapping[str, str] | None = None) -> list[Held]:
    """All parameters and buffers, tied ones once.

    Raises:
        ValueError: one is lazy, or a DTensor of addends.
    """
    inner = bare(model)
    inside = inside_of(inner)
    known = tied_of(inner) if tied is None else tied
    found: dict[int, Held] = {}
    for path, module in inner.named_modules():
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            name = clean_name(f"{path}.{attribute}" if path else attribute, inside)
            _check(name, tensor)
            one = found.setdefault(id(tensor), Held(known.get(name, name), tensor))
            one.names.append(name)
            one.sites.append((module, attribute))
            one.persistent = attribute not in module._non_persistent_buffers_set
    return list(found.values())


def _check(name: str, tensor: Any) -> None:
    if is_lazy(tensor):
        raise ValueError(f"{name} is lazy, and has no shape yet: give the module its sizes, or run it once")
    if is_dtensor(tensor) and any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(f"{name} is placed {tuple(tensor.placements)}: no process has its values; redistribute it to "
                         "Replicate or Shard")


def device_for(one: Held, device: torch.device | None) -> torch.device:
    """Where a tensor of meta is to live: as asked, else on the device of its mesh, else on the CPU."""
    if device is not None:
        return device
    kind = one.tensor.device_mesh.device_type if is_dtensor(one.tensor) else "cpu"
    return torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def replace(one: Held, part: Tensor) -> None:
    """Put a local part, which is memory now, where a tensor of meta stands; at all sites the same."""
    old = one.tensor
    new: Any = part
    if is_dtensor(old):
        new = type(old).from_local(part, old.device_mesh, old.placements, run_check=False, shape=old.shape,
                                   stride=old.stride())
    if one.is_parameter:
        new = nn.Parameter(new, old.requires_grad)
        new.__dict__.update({key: value for key, value in old.__dict__.items() if not key.startswith("_")})
        if declared(old):
            declare(new)
    for module, attribute in one.sites:
        (module._parameters if one.is_parameter else module._buffers)[attribute] = new
    one.tensor = new
