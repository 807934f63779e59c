"""A model cut into stages: each rank of a pipeline keeps its own, under the names of the whole model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

from torch import nn

from fasttrain.dist.mesh import Mesh
from fasttrain.dist.wire import Wire
from fasttrain.parallel.pipeline import costs as costing
from fasttrain.parallel.pipeline import cuts, held, schedules, tied
from fasttrain.parallel.pipeline.parts import names_in, parted, whole
from fasttrain.parallel.ties import TOLD, WHOLE


def split(model: Any, mesh: Mesh, stages_per_rank: int | None = None, costs: str | Sequence[float] | None = None,
          sample: Any = None, *, schedule: str = "1f1b") -> nn.Module:
    """Cut a model into stages along the axis "pipeline" of a mesh, and keep those of this rank.

    The parts of the model, in their order, are cut so that the dearest stage costs as little as it can. The model is
    changed in place: the parts of other ranks are dropped, and what stays keeps its names, also where a rank has
    several stages. Split after tensors are cut (`tensor_parallel`, whose plan names modules of the whole model), and
    before the model is wrapped (`DataParallel`), sharded or given to an optimizer; it may be on the meta device. A
    parameter that several stages use (an embedding tied to the head) is held by each of their ranks: see `ties`.

    Arguments:
        model: the same on every rank: one that has `parts`, `keep` and `run`
            (`fasttrain.parallel.pipeline.parts.Parted`), an ``nn.Sequential``, or a list of blocks.
        mesh: with an axis "pipeline".
        stages_per_rank: None: as the schedule has them by default.
        costs: one for each part; "measured": the seconds that forward and backward take on the first rank, the
            median of five; None: counted, in operations if there is a sample, else in parameters but embeddings.
        sample: a micro-batch of inputs.
        schedule: for which stages are placed; see `fasttrain.parallel.pipeline.schedules.KINDS`.

    Returns:
        The model; a Sequential for a list of blocks. What it holds is told by `held.of(model).table()`.

    Raises:
        TypeError: the model cannot be cut.
        ValueError: more stages than parts, costs of another number, an unknown schedule; the same text on every rank.

    Example:
        >>> model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
        >>> stage = split(model, Mesh(pipeline=2))                                        # doctest: +SKIP
        >>> [name for name, _ in stage.named_parameters()]    # on the second rank        # doctest: +SKIP
        ['2.weight', '2.bias', '3.weight', '3.bias']
    """
    model = whole(model)
    names = parted(model).parts()
    placement = schedules.placed(schedule, mesh.sizes["pipeline"], stages_per_rank)
    cuts.check([0.0] * len(names), placement.stages)
    everyone = mesh.wire()
    known = _costs(model, mesh, names, costs, sample)
    counts = cuts.cut(known, placement.stages)
    _agree(everyone, {"parts": names, "costs": known, "stages": counts, "schedule": schedule.lower()})
    ends = [0, *accumulate(counts)]
    stages = [names[begin:end] for begin, end in pairwise(ends)]
    sums = [sum(known[begin:end]) for begin, end in pairwise(ends)]
    rank = mesh.coordinates["pipeline"]
    first = tied.aliases(model)
    uses = {stage: names_in(model, parts) for stage, parts in enumerate(stages)}
    everywhere = [[name for stage in placement.of(place) for name in uses[stage]] for place in range(placement.ranks)]
    ties = tied.found(first, everywhere, rank)
    modules = tied.modules(model)
    mine = placement.of(rank)
    parted(model).keep([part for stage in mine for part in stages[stage]])
    setattr(model, held.MARK, held.Held(schedule.lower(), placement, rank, stages, sums,
                                        {stage: uses[stage] for stage in mine}, ties))
    setattr(model, TOLD, held.ties(model))
    setattr(model, WHOLE, {tie.here: (tie.name, modules[tie.name]) for tie in ties if tie.here is not None})
    return model


def _costs(model: nn.Module, mesh: Mesh, names: list[str], costs: str | Sequence[float] | None, sample: Any
           ) -> list[float]:
    """A number for each part, the same on every rank."""
    if costs is None:
        return costing.counted(model, sample)
    if isinstance(costs, str):
        if costs != "measured":
            raise ValueError(f"costs={costs!r}: give a number for each part, \"measured\", or None")
        if sample is None:
            raise ValueError("costs=\"measured\" needs a sample: a micro-batch of the model's inputs")
        if any(p.is_meta for p in model.parameters()):
            return costing.counted(model, sample)
        return _measured_by_the_first(model, mesh, sample)
    if len(costs) != len(names):
        raise ValueError(f"there are {len(costs)} costs for {len(names)} parts ({', '.join(names[:4])} ...): give one "
                         "for each")
    return [float(cost) for cost in costs]


def _measured_by_the_first(model: nn.Module, mesh: Mesh, sample: Any) -> list[float]:
    """By the first rank, and by those with which it computes one sample, as parts that are cut over "tensor" do."""
    said: dict[str, Any] = {}
    if mesh.index("pipeline", "data", "shard") == 0:
        try:
            said["costs"] = costing.measured(model, sample)
        except Exception as error:  # told to all ranks below
            said["error"] = f"{type(error).__name__}: {error}"
    told = next(filter(None, map(json.loads, mesh.wire().gather_objects_json(json.dumps(said)))))
    if "error" in told:
        raise ValueError(f"the parts could not be measured on the first rank: {told['error']}")
    return told["costs"]


def _agree(everyone: Wire, decided: dict[str, Any]) -> None:
    texts = everyone.gather_objects_json(json.dumps(decided))
    for rank, text in enumerate(texts):
        if text != texts[0]:
            here, there = json.loads(texts[0]), json.loads(text)
            key = next(key for key in here if here[key] != there[key])
            raise ValueError(f"the ranks split different models: rank 0 has {key} {here[key]}, rank {rank} "
                             f"{there[key]}")
