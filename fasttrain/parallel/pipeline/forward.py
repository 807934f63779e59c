"""Forward passes without gradients: each stage of a rank in its turn takes all micro-batches.

torch's schedules can leave their backward passes out, but those whose stages lie in a V then fail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fasttrain.dist.wire import Wire
from fasttrain.parallel.pipeline.boundaries import Boundary
from fasttrain.parallel.pipeline.clock import Action
from fasttrain.parallel.pipeline.held import Held


def forward(wire: Wire, held: Held, micro_batches: int, between: Sequence[Boundary],
            run: Callable[[int, int, Any], Any], log: list[Action]) -> None:
    """Run all stages of this rank.

    Arguments:
        run: a stage on a micro-batch and what the stage before gave.
    """
    placement = held.placement
    here: dict[int, list[Any]] = {}  # what a stage gave to the next one on the same rank
    sent: list[Any] = []
    for stage in held.mine:
        source = placement.rank(stage - 1) if stage else None
        target = placement.rank(stage + 1) if stage < placement.stages - 1 else None
        for number in range(micro_batches):
            given = None
            if source == held.rank:
                given = here[stage][number]
            elif source is not None:
                given = between[stage - 1].given(_receive(wire, between[stage - 1], source))
            y = run(stage, number, given)
            log.append(Action("F", stage, number))
            if target == held.rank:
                here.setdefault(stage + 1, []).append(y)
            elif target is not None:
                sent += _send(wire, y, target)
        here.pop(stage, None)
    for work, _ in sent:
        work.wait()


def _receive(wire: Wire, boundary: Boundary, source: int) -> list[Tensor]:
    tensors = [torch.empty_like(t, device=wire.device) for t in boundary.empty("meta")]
    works: list[Any] = [dist.irecv(t, group=wire.group, group_src=source) for t in tensors]
    for work in works:
        work.wait()
    return tensors


def _send(wire: Wire, given: Any, target: int) -> list[tuple[Any, Tensor]]:
    """Messages under way, each with its tensor, which lives as long."""
    works = []
    for tensor in [given] if isinstance(given, Tensor) else given:
        tensor = tensor.detach().contiguous()
        counted(wire, "activations", tensor.nbytes)
        works.append((dist.isend(tensor, group=wire.group, group_dst=target), tensor))
    return works


def counted(wire: Wire, kind: str, nbytes: int) -> None:
    """Count a message that is sent past the wire, whose own collectives are numbered alike on all ranks."""
    wire.calls[kind] += 1
    wire.bytes[kind] += nbytes
