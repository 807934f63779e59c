"""The ranks over which `shard` divides a model: a mesh of torch's, or a `Mesh` of several axes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import register_fsdp_forward_method

from fasttrain.dist.mesh import MEAN, Mesh
from fasttrain.dist.watcher import Watcher
from fasttrain.dist.watching import wire_over
from fasttrain.dist.wire import Wire
from fasttrain.parallel import held, hybrid, shardable, ties
from fasttrain.parallel.widened import widen

STAGE = ("data", "shard", "expert", "context", "tensor")  # their ranks have parameters of the same names


class Grid:
    """What `shard` asks.

    Attributes:
        everyone: the wire of all ranks.
        alike: of those with parameters of the same names.
        shape: what the ranks are to agree on.
        terms: of how many ranks' losses a gradient is the mean.
        counts: this rank's loss and items are those that count, of all ranks that have the same.
    """

    everyone: Wire
    alike: Wire
    shape: Any
    terms: int
    counts: bool = True

    def make_equal(self, model: nn.Module) -> None:
        """Give ranks that hold the same the first one's."""
        raise NotImplementedError

    def units(self, model: nn.Module, blocks: Sequence[nn.Module]) -> list[list[nn.Module]]:
        """The modules that are gathered one after the other, those within others first; some together."""
        return [[part] for part in (*blocks, model)]

    def mesh_of(self, part: nn.Module) -> DeviceMesh:
        """Over which a unit is sharded."""
        raise NotImplementedError

    def divide(self, part: Any) -> None:
        """Have the gradients of a unit divided by `terms`, where torch would divide by another number."""

    def shards(self) -> Wire:
        """A wire between the ranks that hold different shards."""
        raise NotImplementedError

    def cut(self, model: nn.Module) -> dict[int, int]:
        """By the number of copies of each shard, the elements that the shards here are cut of."""
        raise NotImplementedError

    def widen(self, model: nn.Module) -> None:
        """Let the norm of the gradients be that of the whole model, where that needs more than its parameters."""

    def tie(self) -> None:
        """Add up the gradients of parameters that several stages have."""


class Torch(Grid):
    """Of torch: one dimension of shards, or copies and shards."""

    def __init__(self, mesh: DeviceMesh | None, model: nn.Module, timeout_s: float, watch: Watcher | bool):
        self.device = shardable.device_of(model, mesh)
        self.mesh = shardable.mesh_of(mesh, self.device)
        self.timeout_s, self.watch = timeout_s, watch
        self.everyone = self.alike = wire_over(self.mesh.mesh.flatten().tolist(), self.device, timeout_s, watch)
        self.shape, self.terms = list(self.mesh.mesh.shape), self.everyone.size

    def make_equal(self, model: nn.Module) -> None:
        shardable.make_equal(self.everyone, model)

    def mesh_of(self, part: nn.Module) -> DeviceMesh:
        return self.mesh

    def shards(self) -> Wire:
        if self.mesh.ndim == 1:
            return self.everyone
        return wire_over(self.mesh.get_group(1), self.device, self.timeout_s, self.watch)

    def cut(self, model: nn.Module) -> dict[int, int]:
        elements = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return {self.everyone.size // self.mesh.size(self.mesh.ndim - 1): elements}


class Named(Grid):
    """A `Mesh`: cut along "shard", with copies along data, expert and context."""

    def __init__(self, mesh: Mesh, model: nn.Module, tied: Mapping[str, Sequence[int]]):
        hybrid.check(mesh, model)
        self._ties = ties.of(mesh, model, tied)
        self.mesh = mesh
        self.everyone, self.alike = mesh.wire(), mesh.wire(*STAGE)
        self.shape, self.terms = mesh.sizes, mesh.terms
        self.counts = mesh.coordinates["tensor"] == 0 and mesh.last_stage
        self._experts = set(hybrid.experts(model))
        self._dense = hybrid.of(mesh)
        self._apart = hybrid.of(mesh, "expert") if self._experts else self._dense

    def make_equal(self, model: nn.Module) -> None:
        held.make_equal(self.mesh, list(model.named_parameters()))
        self._ties.make_equal(model)
        # A buffer may tell which part of the vocabulary, or which experts, are here.
        held.make_equal(self.mesh, list(model.named_buffers()), ("data", "shard", "context"))

    def units(self, model: nn.Module, blocks: Sequence[nn.Module]) -> list[list[nn.Module]]:
        found = [*(part for part in model.modules() if part in self._experts and part not in blocks), *blocks]
        alone = hybrid.alone(model, found) if self.mesh.sizes["pipeline"] > 1 else []
        whole = [model] if model not in self._experts else []
        return [*([part] for part in found), *hybrid.together(alone), *([part] for part in whole)]

    def mesh_of(self, part: nn.Module) -> DeviceMesh:
        return self._apart if part in self._experts else self._dense

    def divide(self, part: Any) -> None:
        if part in self._experts and self.mesh.sizes["expert"] > 1:
            part.set_gradient_divide_factor(float(self.terms))
            part.set_force_sum_reduction_for_comms(True)  # else the factor rides in an operation that gloo lacks
        if part in self._experts and hasattr(part, "batched"):
            register_fsdp_forward_method(part, "batched")  # how a mixture with a capacity calls its experts

    def shards(self) -> Wire:
        return Wire(self.mesh.device, self.mesh.timeout_s, self.mesh.ranks("shard"), self.everyone.watch)

    def cut(self, model: nn.Module) -> dict[int, int]:
        found: Counter[int] = Counter()
        for name, p in model.named_parameters():
            if p.requires_grad:
                apart = held.cut(name, p)
                found[self.mesh.count(*(axis for axis in MEAN if axis not in ("shard", *apart)))] += \
                    p.numel() // self.mesh.count(*(axis for axis in apart if axis != "shard"))
        return dict(found)

    def widen(self, model: nn.Module) -> None:
        if self.mesh.sizes["pipeline"] > 1 and callable(getattr(model, "run", None)):
            register_fsdp_forward_method(model, "run")  # what stages call instead of the model
        self._ties.found(model)
        widen(self.mesh, self.everyone, list(model.named_parameters()), self._ties.stages)

    def tie(self) -> None:
        self._ties.add()
