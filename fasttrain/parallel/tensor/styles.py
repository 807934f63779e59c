"""Styles: what a plan does to one module. Each is a ParallelStyle of torch, and runs the module on plain local tensors.

Torch's own run a module on DTensors, and send once for each module; these send once for what several modules read, and
take modules that DTensor has no rules for. Both can stand in one plan.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import _StridedShard

from fasttrain.parallel.tensor import partial
from fasttrain.parallel.tensor.cut import distributed, local, shown
from fasttrain.parallel.tensor.moves import ADDENDS, CUT, JOIN, Move, first_moved
from fasttrain.parallel.tensor.shared import Shared


def transposed(module: nn.Module) -> bool:
    """Whether it is a linear layer with a weight of shape (in, out): the Conv1D of transformers' GPT-2."""
    weight = getattr(module, "weight", None)
    named = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    return named and isinstance(weight, Tensor) and weight.ndim == 2


def linear(module: nn.Module) -> bool:
    """Whether it is a linear layer, of torch or transposed."""
    return isinstance(module, nn.Linear) or transposed(module)


def features(module: Any) -> tuple[int, int]:
    """Features that go into a linear layer, and out."""
    first, second = module.weight.shape
    return (first, second) if transposed(module) else (second, first)


class Site(NamedTuple):
    """A module that runs in a style.

    Attributes:
        module: its parameters are placed.
        mesh: DeviceMesh of the tensor axis.
        name: for errors.
        gradients: how those of its placed parameters are.
    """

    module: Any
    mesh: Any
    name: str
    gradients: dict[str, Placement]

    def owner(self, name: str) -> tuple[nn.Module, str]:
        """The module that has a parameter, and the last part of its name."""
        path, _, last = name.rpartition(".")
        return self.module.get_submodule(path) if path else self.module, last

    def local(self, name: str) -> Any:
        """What this rank has of a parameter, in the autograd graph; a plain one as it is."""
        module, last = self.owner(name)
        p = module._parameters[last]
        return local(p, self.gradients[name]) if name in self.gradients else p


class Style(ParallelStyle):
    """Parameters are copies on every rank; the first input and the first output may be placed otherwise.

    Arguments:
        input, output: how they are, if they are; see `fasttrain.parallel.tensor.moves`.
        addends: each rank's gradients of the module's parameters are addends (it sees its own positions, or heads).
        divide: names of attributes that count what each rank has a part of; each becomes the rank's own count.
    """

    def __init__(self, input: Move | None = None, output: Move | None = None, *, addends: bool = False,
                 divide: tuple[str, ...] = ()):
        self.input, self.output, self.addends, self.divide = input, output, addends, divide

    def cuts(self, module: nn.Module) -> dict[str, Placement]:
        """How parameters of the module are placed, by their names in it; those that are not named stay plain."""
        return {name: Replicate() for name, _ in module.named_parameters()} if self.addends else {}

    def problem(self, module: nn.Module, size: int) -> str | None:
        """What keeps this module from having the style over so many ranks: the end of a sentence about it."""
        for name in self.divide:
            if (count := getattr(module, name, 0)) % size:
                return f"its {name} of {count} cannot be divided by {size}: choose a tensor size that divides it"
        return None

    # --- One call of the module ---------------------------------------------------------------------------------------

    def enter(self, at: Site, x: Any) -> Any:
        """The first input as the module gets it."""
        return first_moved(x, at.mesh, self.input, at.name)

    def compute(self, at: Site, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The local output of local inputs."""
        with shown(self.values(at)):
            return forward(*args, **kwargs)

    def values(self, at: Site) -> list[tuple[nn.Module, str, Any]]:
        """What modules have in the place of their attributes, while they run."""
        return [(*at.owner(name), at.local(name)) for name in at.gradients]

    def finish(self, at: Site, output: Any) -> Any:
        """The output as it leaves the module."""
        return first_moved(output, at.mesh, self.output, at.name)

    # --- Applying -----------------------------------------------------------------------------------------------------

    def attach(self, module: nn.Module, mesh: Any, name: str) -> nn.Module:
        """Let a module whose parameters are placed run so."""
        for attribute in self.divide:
            if hasattr(module, attribute):
                setattr(module, attribute, getattr(module, attribute) // mesh.size())
        cuts = self.cuts(module)
        gradients = {inner: ADDENDS if placement.is_replicate() else placement for inner, placement in cuts.items()}
        for inner, gradient in gradients.items():
            if gradient.is_partial():
                partial.declare(module.get_parameter(inner))
        forward, bound = module.forward, getattr(module.forward, "__func__", None)
        first = next(iter(inspect.signature(forward).parameters), "")

        def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            at = Site(module, mesh, name, gradients)
            own = forward if bound is None else types.MethodType(bound, module)  # a copy of the module runs itself
            if args:
                args = (self.enter(at, args[0]), *args[1:])
            elif first in kwargs:
                kwargs = {**kwargs, first: self.enter(at, kwargs[first])}
            return self.finish(at, self.compute(at, own, args, kwargs))

        module.forward = types.MethodType(run, module)
        return module

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        """For torch's `parallelize_module`, which knows no names."""
        name = type(module).__name__
        if said := self.problem(module, device_mesh.size()):
            raise ValueError(f"{name} cannot be placed: {said}")
        for inner, placement in self.cuts(module).items():
            path, _, last = inner.rpartition(".")
            owner = module.get_submodule(path)
            owner.register_parameter(last, distributed(owner.get_parameter(last), device_mesh, placement))
        return self.attach(module, device_mesh, name)


class Column(Style):
    """A linear layer of which each rank computes some of the features that go out.

    Arguments:
        input: what brings the input to all ranks; None if it has been brought to the module that calls this one.
        pieces: features that go out are so many tensors side by side, and each rank has a part of each.
        unit: features of what cannot be divided, as a head, and `units`: how errors call several.
    """

    def __init__(self, input: Move | None, pieces: int = 1, unit: int = 1, units: str = ""):
        super().__init__(input)
        self.pieces, self.unit, self.units = pieces, unit, units
        self.shared: Shared | None = None  # with other columns of the module around this one

    def enter(self, at: Site, x: Any) -> Any:
        def bring(x: Any) -> Any:
            return Style.enter(self, at, x)

        return bring(x) if self.shared is None else self.shared.bring(x, bring)

    def cuts(self, module: nn.Module) -> dict[str, Placement]:
        """A bias in pieces is whole on every rank, which uses its part: `fully_shard` cannot cut such a part again."""
        dim, biased = 1 if transposed(module) else 0, getattr(module, "bias", None) is not None
        if self.pieces > 1:
            placed: dict[str, Placement] = {"weight": _StridedShard(dim, split_factor=self.pieces)}
            return {**placed, "bias": Replicate()} if biased else placed
        return {"weight": Shard(dim), **({"bias": Shard(0)} if biased else {})}

    def problem(self, module: nn.Module, size: int) -> str | None:
        if not linear(module):
            return (f"a {type(module).__name__} has no columns: torch's Linear and transformers' Conv1D can be "
                    "\"column\", an Embedding \"vocabulary\", a norm \"sequence\"")
        _, out = features(module)
        count, rest = divmod(out, self.unit * self.pieces)
        if rest or count % size:
            whole = f", of {out / self.unit / self.pieces:g} {self.units}," if self.units else ""
            return (f"its {out} features that go out{whole} cannot be divided by {size}: choose a tensor size that "
                    f"divides the {self.units or 'features'}, or another number of them")
        return None

    def values(self, at: Site) -> list[tuple[nn.Module, str, Any]]:
        found = super().values(at)
        if transposed(at.module):
            found.append((at.module, "nf", at.module.nf // at.mesh.size()))
        if self.pieces == 1:
            return found
        return [(module, name, self.part(value, at.mesh) if name == "bias" else value) for module, name, value in found]

    def part(self, bias: Tensor, mesh: Any) -> Tensor:
        """What this rank uses of a bias in pieces."""
        return bias.view(self.pieces, mesh.size(), -1)[:, mesh.get_local_rank()].flatten()


class Row(Style):
    """A linear layer of which each rank has some of the features that come in, after a column.

    Arguments:
        output: what makes the output of the addends.
        addends: each rank has other positions of the output: its gradient of the bias is an addend.
    """

    def __init__(self, output: Move, addends: bool):
        super().__init__(None, output, addends=addends)

    def cuts(self, module: nn.Module) -> dict[str, Placement]:
        placed: dict[str, Placement] = {"weight": Shard(0 if transposed(module) else 1)}
        if self.addends and getattr(module, "bias", None) is not None:
            placed["bias"] = Replicate()
        return placed

    def problem(self, module: nn.Module, size: int) -> str | None:
        if not linear(module):
            return (f"a {type(module).__name__} has no rows: torch's Linear and transformers' Conv1D can be \"row\", "
                    "an Embedding \"vocabulary\", a norm \"sequence\"")
        into, _ = features(module)
        if into % size:
            return (f"its {into} features that come in cannot be divided by {size}: choose a tensor size that divides "
                    "them, or another width")
        return None

    def compute(self, at: Site, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, = (*args, *kwargs.values())
        return x @ at.local("weight") if transposed(at.module) else F.linear(x, at.local("weight"))

    def finish(self, at: Site, output: Any) -> Any:
        output = super().finish(at, output)
        return output if getattr(at.module, "bias", None) is None else output + at.local("bias").to(output.dtype)


class Whole(Style):
    """A module that needs all positions, where they are divided: they are brought to it, and what leaves is cut again.

    Numbers of tokens or positions, which are not divided, are left as they come.
    """

    def __init__(self) -> None:
        super().__init__(JOIN, CUT)

    def enter(self, at: Site, x: Any) -> Any:
        return super().enter(at, x) if x.is_floating_point() else x
