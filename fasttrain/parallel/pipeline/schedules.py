"""Schedules of torch by name: what each asks for, and how it is made.

Sources: GPipe, arXiv 1811.06965; 1F1B: PipeDream-Flush, arXiv 2006.09503; interleaved: arXiv 2104.04473, section 2.2;
breadth first: arXiv 2211.05953; zero bubble and its V: arXiv 2401.10241; DualPipeV: after arXiv 2412.19437.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from fasttrain.parallel.pipeline.placement import Placement


class Kind(NamedTuple):
    """What a schedule is.

    Attributes:
        torchs: name of the class of torch.
        each: stages on a rank if nothing is said.
        exactly: it takes no other number of stages on a rank.
        shape: how stages are placed.
        split: backward passes come in two, for inputs and for weights.
        one: torch's class takes one stage, and reduces when the step is over.
    """

    torchs: str
    each: int = 1
    exactly: bool = False
    shape: str = "loop"
    split: bool = False
    one: bool = False


KINDS = {
    "gpipe": Kind("ScheduleGPipe", exactly=True, one=True),
    "1f1b": Kind("Schedule1F1B", exactly=True, one=True),
    "interleaved": Kind("ScheduleInterleaved1F1B", each=2),
    "breadth-first": Kind("ScheduleLoopedBFS", each=2),
    "zero-bubble": Kind("ScheduleInterleavedZeroBubble", each=2, split=True),
    "zbv": Kind("ScheduleZBVZeroBubble", each=2, exactly=True, shape="v", split=True),
    "dualpipev": Kind("ScheduleDualPipeV", each=2, exactly=True, shape="v", split=True),
}


def kind(name: str) -> Kind:
    """What the schedule of a name is; upper case counts as lower.

    Raises:
        ValueError: there is no such schedule.
    """
    if name.lower() not in KINDS:
        raise ValueError(f"there is no schedule {name!r}: take one of {', '.join(KINDS)}")
    return KINDS[name.lower()]


def placed(name: str, ranks: int, each: int | None) -> Placement:
    """Where a schedule has its stages.

    Raises:
        ValueError: it cannot have so many stages on a rank.
    """
    asked = kind(name)
    if each is None:
        each = asked.each
    if each < 1 or (asked.exactly and each != asked.each):
        others = [other for other, its in KINDS.items() if not its.exactly]
        raise ValueError(f"the schedule {name!r} has {asked.each}{'' if asked.exactly else ' or more'} stages on each "
                         f"rank, and stages_per_rank is {each}: leave it out"
                         + (f", or take {' or '.join(others)}" if asked.exactly and each > 0 else ""))
    return Placement(ranks, each, asked.shape)


def check_micro_batches(name: str, placement: Placement, micro_batches: int) -> None:
    """Raise ValueError if a schedule cannot have so many micro-batches."""
    ranks, stages = placement.ranks, placement.stages
    if isinstance(micro_batches, bool) or not isinstance(micro_batches, int) or micro_batches < 1:
        raise ValueError(f"micro_batches={micro_batches!r}: a step has at least one micro-batch")
    name = name.lower()
    if name in ("1f1b", "dualpipev") and micro_batches < stages:
        raise ValueError(f"the schedule {name!r} of {stages} stages needs {stages} micro-batches or more, and there "
                         f"are {micro_batches}: take more micro-batches, fewer ranks along pipeline, or gpipe")
    rounds = max(1, micro_batches // ranks)
    if name in ("interleaved", "zero-bubble") and micro_batches % rounds:
        more = micro_batches + 1
        while more % max(1, more // ranks):
            more += 1
        raise ValueError(f"the schedule {name!r} on {ranks} ranks goes in {rounds} rounds, into which {micro_batches} "
                         f"micro-batches do not divide: take {micro_batches // ranks * ranks} or {more}")


def make(name: str, stages: list[Any], micro_batches: int, loss: Callable[..., Any],
         reduce: Callable[[int], None] | None = None) -> Any:
    """A schedule of torch over these stages of this rank.

    Arguments:
        reduce: called with a stage when all its gradients are there, if the schedule tells; it takes the place of
            torch's own reduction.
    """
    from torch.distributed.pipelining import schedules

    asked = kind(name)
    made = getattr(schedules, asked.torchs)(stages[0] if asked.one else stages, micro_batches, loss_fn=loss,
                                            scale_grads=False)
    if reduce is not None and not asked.one:
        made.register_custom_function(schedules._ComputationType.REDUCE_GRAD,
                                      lambda action, _: reduce(action.stage_index))
    return made


def check_split(model: nn.Module) -> None:
    """See that torch computes a backward pass in two parts rightly; older ones do not where a weight is used twice, or
    an operation has several outputs.

    Raises:
        RuntimeError: it does not.
        ValueError: a part of the model is compiled, and does its backward pass in one.
    """
    from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

    if any(type(module).__name__ == "OptimizedModule" for module in model.modules()):
        raise ValueError("the schedule splits backward passes, which a compiled module does in one: take 1f1b or "
                         "interleaved, or do not compile")
    w = nn.Parameter(torch.tensor([[0.5, -0.25], [0.75, 0.125]]))
    x = torch.tensor([[1.0, -0.5]], requires_grad=True)

    def output() -> torch.Tensor:
        a, b = (x @ w @ w).tanh().chunk(2, dim=1)
        c, d = (torch.cat((a, b), 1) * w[0]).chunk(2, dim=1)
        return (c + 2 * d).sum()

    want, = torch.autograd.grad(output(), w)
    _, groups = stage_backward_input([output()], None, [x], iter([w]))
    stage_backward_weight(iter([w]), groups)
    if w.grad is None or not torch.allclose(w.grad, want):
        raise RuntimeError(f"torch {torch.__version__} computes wrong gradients where a backward pass comes in two "
                           "parts: take a newer torch, or a schedule that does not split it (1f1b, interleaved)")
