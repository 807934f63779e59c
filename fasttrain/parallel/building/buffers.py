"""Buffers outside of the state dict, which a model built on meta has to compute once more: tables of angles, masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fasttrain.parallel.building import hugging_face
from fasttrain.parallel.building.tensors import Held, device_for, replace


def build_all(buffers: list[Held], builders: Mapping[str, nn.Module], device: torch.device | None) -> None:
    """Have every module compute its buffers, once."""
    for module in {id(each): each for each in builders.values()}.values():
        build(module, [one for one in buffers if builders.get(one.name) is module], device)


def builders_of(model: nn.Module, buffers: list[Held]) -> dict[str, nn.Module]:
    """By the name of a buffer the innermost module that computes it."""
    found = {}
    for one in buffers:
        owner = one.sites[0][0]
        for module in model.modules():
            if any(inner is owner for inner in module.modules()) and (
                    callable(getattr(module, "build_buffers", None)) or hugging_face.has_tables(module)):
                found[one.name] = module
    return found


def build(module: Any, buffers: list[Held], device: torch.device | None) -> None:
    """Have a module compute buffers, which keep their dtypes."""
    where = device_for(buffers[0], device)
    with torch.device(where):
        made: dict[str, Tensor] = {}
        if callable(getattr(module, "build_buffers", None)):
            module.build_buffers()
        else:
            made = hugging_face.rotary_tables(module)
    for one in buffers:
        owner, attribute = one.sites[0]
        new = made.get(attribute, owner._buffers[attribute])
        if new is None or new.is_meta or new.shape != one.tensor.shape:
            raise ValueError(f"build_buffers() of {type(module).__name__} left {one.name} "
                             f"{'on meta' if new is None or new.is_meta else f'of shape {tuple(new.shape)}'}: it is to "
                             f"assign a tensor of shape {tuple(one.tensor.shape)} on torch's default device")
        replace(one, new.to(where, one.tensor.dtype))
