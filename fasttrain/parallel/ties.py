"""Parameters that several stages of a pipeline have, sharded: their gradients are added up after each is reduced."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasttrain.dist.mesh import AXES, Mesh
from fasttrain.dist.wire import Wire
from fasttrain.optim.local import local
from fasttrain.parallel import tied_names

# Attributes of a model that was split into stages: what it has for `tied`; and by name here, what that is called in the
# whole model, and the classes of the modules there that have it (`fasttrain.guards.decay` reads it).
TOLD, WHOLE = "tied_stages", "tied_in_whole"


def told(model: nn.Module, tied: Mapping[str, Sequence[int]] | None) -> Mapping[str, Sequence[int]]:
    """The ties that a caller gave, or those that a model knows of itself (`fasttrain.parallel.pipeline.split`)."""
    return getattr(model, TOLD, None) or {} if tied is None else tied


def trained(model: nn.Module, tied: Mapping[str, Sequence[int]] | None, mesh: Any) -> Mapping[str, Sequence[int]]:
    """Of these, what is trained, where the model itself knows its ties; a collective of the pipeline.

    Raises:
        ValueError: only some of the stages that have a parameter train it; the same text on every rank.
    """
    known = told(model, tied)
    if tied is not None or not known or not isinstance(mesh, Mesh) or mesh.sizes["pipeline"] == 1:
        return known
    named = dict(model.named_parameters(remove_duplicate=False))
    mine = [named[name].requires_grad if name in named else None for name in known]
    texts = mesh.wire("pipeline").gather_objects_json(json.dumps(mine))
    by_stage = [json.loads(text) for text in texts]
    whole = [vars(model).get(WHOLE, {}).get(name, (name,))[0] for name in known]
    for name, flags in zip(whole, zip(*by_stage, strict=True), strict=True):
        if True in flags and False in flags:
            do, do_not = ([stage for stage, flag in enumerate(flags) if flag is wanted] for wanted in (True, False))
            raise ValueError(f"{name} has copies on several stages, of which {do} train it and {do_not} do not: freeze "
                             "it on all of them, or on none")
    return {name: stages for (name, stages), flags in zip(known.items(), zip(*by_stage, strict=True), strict=True)
            if True in flags}


class Ties:
    """Make them with `of`.

    Arguments:
        stage: of this rank.
        stages: by name here, those that have the parameter too, ascending; in an order that all stages share.
        wires: to the same shard on these stages.
    """

    def __init__(self, stage: int, stages: Mapping[str, tuple[int, ...]], wires: Mapping[tuple[int, ...], Wire]):
        self.stage, self.stages, self.wires = stage, stages, wires
        self.params: dict[tuple[int, ...], list[Tensor]] = {}

    def found(self, model: nn.Module) -> None:
        """Take the parameters from the model, which has its shards now."""
        named: dict[tuple[int, ...], list[tuple[str, Tensor]]] = {}
        for name, stages in self.stages.items():
            named.setdefault(stages, []).append((name, model.get_parameter(name)))
        for stages in sorted(named):
            tied_names.settle(self.wires[stages], self.stage, named[stages])
        self.params = {stages: [p for _, p in pairs] for stages, pairs in named.items()}

    @torch.no_grad()
    def make_equal(self, model: nn.Module) -> None:
        """Give every stage the first one's copies; a collective, as `add`."""
        for stages in sorted(self.wires):
            for name in (name for name, given in self.stages.items() if given == stages):
                mine = local(model.get_parameter(name).detach())
                if not mine.is_meta:
                    mine.copy_(self.wires[stages].broadcast_(mine.contiguous()))

    def counts(self, name: str) -> bool:
        """Whether this stage counts a parameter in norms: the first one that has it does."""
        return name not in self.stages or self.stages[name][0] == self.stage

    @torch.no_grad()
    def add(self) -> None:
        """Give every stage the sum of all stages' gradients; a collective of the ranks that hold the same shard."""
        for stages in sorted(self.params):
            params = self.params[stages]
            for p in params:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            grads = [local(p.grad) for p in params]
            total = self.wires[stages].sum_(torch.cat([grad.flatten() for grad in grads]))
            for grad, part in zip(grads, total.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(part.view(grad.shape))


def of(mesh: Mesh, model: nn.Module, tied: Mapping[str, Sequence[int]]) -> Ties:
    """The ties of this stage, and wires for them.

    Raises:
        ValueError: a stage that there is not, or a tie without this one.
    """
    here, count = mesh.coordinates["pipeline"], mesh.sizes["pipeline"]
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    stages = {name: tuple(sorted(set(given))) for name, given in tied.items() if name in names}
    for name, given in stages.items():
        if here not in given or not all(isinstance(stage, int) and 0 <= stage < count for stage in given):
            raise ValueError(f"{name} is tied across stages {list(given)}: give numbers of the {count} stages of the "
                             f"pipeline, this one ({here}) among them")
    stages = {name: given for name, given in stages.items() if len(given) > 1}
    index = tuple(mesh.coordinates[axis] for axis in AXES[1:])
    watch = mesh.wire().watch
    wires = {given: Wire(mesh.device, mesh.timeout_s, [int(mesh.torch.mesh[(stage, *index)]) for stage in given], watch)
             for given in sorted(set(stages.values()))}
    return Ties(here, stages, wires)
