"""What a step cannot work with, told where a script makes its stepper, or in its first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fasttrain.dist.wire import Wire
from fasttrain.optim.local import is_dtensor
from fasttrain.parallel.pipeline import Pipeline, held


def check_optimizer(optimizer: Any, ours: bool, bare: nn.Module, clip: float, scaled: bool) -> None:
    """Raise TypeError for what an optimizer of torch cannot do."""
    if ours:
        return
    kind = type(optimizer).__name__
    if scaled:
        raise TypeError(f"a loss scale needs an optimizer of fasttrain.optim: {kind} is not")
    if clip and len({is_dtensor(p) for p in bare.parameters() if p.requires_grad}) > 1:
        raise TypeError("some parameters are cut over ranks and some are whole, which torch's clipping refuses to mix: "
                        f"take an optimizer of fasttrain.optim for {kind}, or clip=0")


def check_pipeline(pipeline: Pipeline | None, model: Any, bare: nn.Module, wire: Wire | None) -> None:
    """Raise TypeError for a pipeline that is missing, or that nobody could reduce for."""
    stages = getattr(bare, held.MARK, None)
    if pipeline is None and stages is not None and stages.placement.ranks > 1:
        raise TypeError(f"the model was split into {len(stages.stages)} stages, of which this rank has {stages.mine}: "
                        "give pipeline=Pipeline(model, mesh, ...), which runs them")
    if pipeline is not None and wire is None:
        raise TypeError(f"a pipeline of a {type(model).__name__}: wrap the model first, in DataParallel(model, "
                        "mesh=mesh) or shard(model, mesh), also where nobody has a copy of it")


def taken_apart(loss: Callable[[Any, Any], Any], model: Any, batch: Any) -> tuple[Any, Any]:
    """Inputs and targets of a pipeline, by the function that has the place of a loss.

    Raises:
        TypeError: it returns something else.
    """
    try:
        given = loss(model, batch)
    except Exception as error:
        error.add_note("with a pipeline, which calls model and loss itself, this function only takes a batch apart: it "
                       "returns (inputs, targets) and does not call the model")
        raise
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise TypeError(f"loss returned a {type(given).__name__}: with a pipeline, which has a loss of its own, it "
                        "takes a batch apart and returns (inputs, targets)")
    return given[0], given[1]
