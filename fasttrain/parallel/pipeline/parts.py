"""A model as a row of parts: its own three methods, or those that a Sequential can have."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol, TypeGuard, runtime_checkable

from torch import nn

from fasttrain.parallel.pipeline.held import MARK


@runtime_checkable
class Parted(Protocol):
    """A model that can be cut: what `fasttrain.train.model.GPT` has, and any model of yours may have."""

    def parts(self) -> list[str]:
        """Names of the parts, in the order in which they run."""

    def keep(self, parts: Sequence[str]) -> None:
        """Drop all other parts, in place; what stays keeps its names."""

    def run(self, parts: Sequence[str], x: Any) -> Any:
        """These parts, on the output of those before: the first takes the model's inputs, the last gives its output."""


class Row:
    """The three methods for an ``nn.Sequential``: its children are the parts.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> Row(model).parts()
        ['0', '1', '2']
    """

    def __init__(self, model: nn.Sequential):
        self.model = model

    def parts(self) -> list[str]:
        return [name for name, _ in self.model.named_children()]

    def keep(self, parts: Sequence[str]) -> None:
        for name in self.parts():
            if name not in parts:
                delattr(self.model, name)  # `del model[i]` would give those behind it other names

    def run(self, parts: Sequence[str], x: Any) -> Any:
        for name in parts:
            x = self.model.get_submodule(name)(x)
        return x


def plain(module: Any) -> TypeGuard[nn.Sequential]:
    """Whether a module only runs its children one after the other."""
    return (isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
            and not module._forward_hooks and not module._forward_pre_hooks)


def whole(model: Any) -> nn.Module:
    """One module of a model, a list of blocks or a ModuleList: of these a Sequential with the same names.

    Raises:
        TypeError: it is none of them.
    """
    if isinstance(model, nn.ModuleList):
        return nn.Sequential(*model)
    if isinstance(model, (list, tuple)) and model and all(isinstance(block, nn.Module) for block in model):
        return nn.Sequential(*model)
    if isinstance(model, nn.Module):
        return model
    raise TypeError(f"{type(model).__name__} cannot be cut into stages: give a model, or a list of its blocks")


def parted(model: nn.Module) -> Parted:
    """A model's three methods.

    Raises:
        TypeError: it has none, and does not only run its children one after the other.
    """
    if isinstance(model, Parted):
        return model
    if isinstance(model, nn.Sequential) and (plain(model) or hasattr(model, MARK)):  # wrappers' hooks came after split
        return Row(model)
    raise TypeError(f"{type(model).__name__} does not say how it is cut into stages: give it the methods parts(), "
                    "keep(parts) and run(parts, x), or make it an nn.Sequential, or give a list of its blocks")


def names_in(model: nn.Module, parts: Sequence[str]) -> list[str]:
    """The names of the parameters that these parts use: those that stay if the model keeps only them."""
    tensors = [*model.parameters(), *model.buffers()]
    skeleton = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})  # modules are copied, tensors shared
    parted(skeleton).keep(parts)
    return [name for name, _ in skeleton.named_parameters(remove_duplicate=False)]
