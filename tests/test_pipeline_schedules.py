"""What schedules really run: every pass in a legal order, idle as long as the formula says, activations as many."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from pipelines import SCHEDULES
from ranks import run
from torch import Tensor, nn

from benchmarks import bench_pipeline
from fasttrain.dist.mesh import Mesh
from fasttrain.parallel.pipeline import Pipeline, clock, figures, schedules, split
from fasttrain.parallel.pipeline.clock import Action
from fasttrain.parallel.pipeline.placement import Placement

MARK = 7  # elements of what is counted as an activation, and nothing else has


class Told(torch.autograd.Function):
    """The identity; its passes are noted, and that of a weight keeps a tensor, as a product keeps its input for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log: list[Action], kind: str, stage: int, number: int) -> Tensor:
        ctx.log, ctx.what = log, (kind, stage, number)
        ctx.save_for_backward(*[x.new_zeros(MARK)] * (kind == "W"))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.log.append(Action(*ctx.what))
        return grad, None, None, None, None


class Part(nn.Module):
    """A linear layer that notes its passes by itself."""

    def __init__(self, stage: int, log: list[Action]):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3) + 0.1)
        self.stage, self.log, self.forwards = stage, log, 0

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return x @ self.weight
        number, self.forwards = self.forwards, self.forwards + 1
        self.log.append(Action("F", self.stage, number))
        weight = Told.apply(self.weight, self.log, "W", self.stage, number)
        return Told.apply(x @ weight, self.log, "I", self.stage, number)


class Kept:
    """Counts what autograd keeps between passes."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> Any:
        return Counted(self, tensor) if tensor.shape == (MARK,) else tensor

    def unpack(self, kept: Any) -> Tensor:
        return kept.tensor if isinstance(kept, Counted) else kept


class Counted:
    def __init__(self, kept: Kept, tensor: Tensor):
        self.kept, self.tensor = kept, tensor
        kept.now += 1
        kept.most = max(kept.most, kept.now)

    def __del__(self) -> None:
        self.kept.now -= 1


class Reductions:
    """In the place of a reducer: what it is told."""

    loss: Any = None

    def __init__(self, params: list[Tensor]):
        self.params, self.told, self.inside = params, [], 0
        self.when: list[int] = []

    def paused(self) -> Any:
        self.inside += 1
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None:
        self.inside -= 1

    def reduce(self, params: Any = None) -> None:
        left = [p for p in self.params if not any(p is q for q in self.told)]
        self.told += left if params is None else list(params)
        if params is not None:
            self.when.append(self.inside)

    def finish(self) -> None:
        self.told.append("end")


def ran(wire: Any, schedule: str, micro_batches: int) -> Any:
    """One step: the actions of the pipeline, the passes that modules noted, and the most activations kept."""
    mesh = Mesh(pipeline=wire.size, watch=False)
    log: list[Action] = []
    count = wire.size * SCHEDULES[schedule]
    stage = split([Part(index, log) for index in range(count)], mesh, schedule=schedule)
    pipeline = Pipeline(stage, mesh, lambda y, t: (y - t).square().mean(), micro_batches=micro_batches)
    pipeline.owner = told = Reductions(list(stage.parameters()))
    batch = torch.randn(micro_batches, 3), torch.randn(micro_batches, 3)
    kept = Kept()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        pipeline.step(*batch)
    assert told.told[-1] == "end"
    once = sorted(map(id, told.told[:-1])) == sorted(map(id, stage.parameters()))
    planned = None
    if not schedules.kind(schedule).one:
        order = next(iter(pipeline._built.values())).pipeline_order_with_comms
        planned = [list(_compute(actions)) for _, actions in sorted(order.items())]
    assert kept.now == 0, "something is kept after the step"
    return list(pipeline.actions), log, kept.most, once, told.when, planned


def _compute(actions: Any) -> Any:
    """The computing actions of a table of torch, and where it reduces."""
    for action in actions:
        for one in action.sub_actions or (action,):
            kind = {"REDUCE_GRAD": "R"}.get(one.computation_type.value, one.computation_type.value)
            if kind in clock.UNIT:
                yield Action(kind, one.stage_index, -1 if kind == "R" else one.microbatch_index)


@pytest.mark.parametrize(("schedule", "ranks", "micro_batches"), [
    ("gpipe", 4, 4), ("1f1b", 4, 8), ("1f1b", 2, 5), ("interleaved", 4, 8), ("interleaved", 2, 2),
    ("breadth-first", 2, 3), ("zero-bubble", 4, 4), ("zero-bubble", 2, 6), ("zbv", 4, 7), ("zbv", 2, 4),
    ("dualpipev", 2, 5)])
def test_what_ran(schedule: str, ranks: int, micro_batches: int) -> None:
    found = run(ran, ranks, schedule, micro_batches)
    actions = [actions for actions, *_ in found]
    times = clock.run([[a for a in mine if a.kind != "R"] for mine in actions])  # raises if the order is not legal
    assert times.idle() == pytest.approx(figures.idle(schedule, ranks, micro_batches), abs=1e-12)
    for rank, (mine, log, most, once, when, planned) in enumerate(found):
        assert most == clock.most_live(mine) == figures.live(schedule, rank, ranks, micro_batches)
        assert planned is None or planned[rank] == mine
        noted_alike(mine, log, micro_batches)
        assert once, "a gradient was told to be complete more than once, or never"
        reduced_in_time(mine, when, SCHEDULES[schedule] if planned else 0)


def noted_alike(actions: list[Action], log: list[Action], micro_batches: int) -> None:
    """The passes that modules noted are those that the pipeline tells of, in its order."""
    def told(kinds: str, as_kind: str) -> list[Action]:
        return [Action(as_kind, stage, number) for kind, stage, number in actions if kind in kinds]

    def noted(kind: str) -> list[Action]:
        return [one for one in log if one.kind == kind]

    assert noted("F") == told("F", "F")
    assert noted("W") == told("BW", "W")
    # torch leaves out the backward pass for inputs of the first stage: that for its weights does all
    first = [one for one in told("BW", "I") if one.stage == 0]
    assert [one for one in noted("I") if one.stage] == [one for one in told("BI", "I") if one.stage]
    assert [one for one in noted("I") if one.stage == 0] == first
    stages = {stage for _, stage, _ in actions}
    for kind in "FIW":
        assert sorted(noted(kind)) == sorted(Action(kind, stage, i) for stage in stages for i in range(micro_batches))


def reduced_in_time(actions: list[Action], when: list[int], stages: int) -> None:
    """Each stage is reduced once, within the schedule, after the last backward pass of it."""
    reductions = [place for place, action in enumerate(actions) if action.kind == "R"]
    assert len(reductions) == stages
    assert when == [1] * stages
    for place in reductions:
        rest = [action for action in actions[place:] if action.stage == actions[place].stage]
        assert [action.kind for action in rest] == ["R"]
    if stages > 1:
        assert reductions[0] < len(actions) - 1, "nothing was reduced before the end"


# --- Without processes ------------------------------------------------------------------------------------------------

def table(schedule: str, ranks: int, micro_batches: int, each: int) -> list[list[Action]]:
    """The computing actions of each rank, from the table that torch makes before anything runs."""
    kind = schedules.kind(schedule)
    placement = Placement(ranks, each, kind.shape)
    stages = [types.SimpleNamespace(
        num_stages=placement.stages, group_size=ranks, group_rank=0, stage_index=stage, submod=None,
        stage_index_to_group_rank={}, has_backward=True) for stage in placement.of(0)]
    made = schedules.make(schedule, stages, micro_batches, lambda output, _: output)
    order = made.pipeline_order if kind.one else made.pipeline_order_with_comms
    return [[one for one in _compute(a for a in order[rank] if a is not None) if one.kind != "R"]
            for rank in range(ranks)]


def product() -> Any:
    for schedule, kind in schedules.KINDS.items():
        for ranks in (1, 2, 3, 4):
            for each in (kind.each,) if kind.exactly else (1, 2):
                for count in range(1, 2 * ranks + 2):
                    yield schedule, ranks, count, each


def test_formulas_for_many_sizes() -> None:
    """1f1b is left out: the table that torch 2.13 shows of it begins with the second micro-batch on the last rank, and
    is not what it runs."""
    seen = set()
    for schedule, ranks, count, each in product():
        try:
            schedules.check_micro_batches(schedule, schedules.placed(schedule, ranks, each), count)
        except ValueError:
            continue
        if schedule == "1f1b":
            continue
        actions = table(schedule, ranks, count, each)
        times = clock.run(actions)
        assert times.idle() == pytest.approx(figures.idle(schedule, ranks, count, each), abs=1e-12)
        assert [clock.most_live(mine) for mine in actions] == [
            figures.live(schedule, rank, ranks, count, each) for rank in range(ranks)], (schedule, ranks, count, each)
        seen.add(schedule)
    assert seen == set(schedules.KINDS) - {"1f1b"}


@pytest.mark.parametrize("ranks", [
    [[Action("F", 0, 0), Action("B", 0, 0)], [Action("B", 1, 0), Action("F", 1, 0)]],   # backward first
    [[Action("B", 0, 0), Action("F", 0, 0)], [Action("F", 1, 0), Action("B", 1, 0)]],
    [[Action("F", 0, 0), Action("W", 0, 0), Action("I", 0, 0)]],                        # weights before inputs
    [[Action("F", 0, 0), Action("F", 0, 0)]],                                           # twice
    [[Action("F", 1, 0), Action("B", 1, 0)]],                                           # without the stage before
])
def test_an_illegal_order_is_refused(ranks: list[list[Action]]) -> None:
    with pytest.raises(ValueError, match=r"ran twice|cannot run"):
        clock.run(ranks)


def test_gpipe_and_1f1b_have_the_same_bubble() -> None:
    assert figures.bubble("gpipe", 4, 8) == figures.bubble("1f1b", 4, 8) == pytest.approx(3 / 11)


def test_the_benchmark_of_schedules() -> None:
    found = run(bench_pipeline.measure, 2, "1f1b", 4, 1e-4, 1)
    row = bench_pipeline.row("1f1b", 4, 1e-4, found)
    assert row["on_the_clock"] == pytest.approx(row["formula"]) == pytest.approx(1 / 4)
    assert row["live"] == [2, 1]
    assert "1f1b" in bench_pipeline.report([row])
