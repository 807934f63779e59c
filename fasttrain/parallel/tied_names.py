"""One name, for random draws and in comparisons, of a parameter that several stages have, each by a name of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence

from torch import Tensor

from fasttrain.dist.wire import Wire
from fasttrain.optim import part
from fasttrain.parallel import tied_groups


def settle(wire: Wire, stage: int, named: Sequence[tuple[str, Tensor]]) -> None:
    """Let stochastic rounding draw alike for all copies, by the names on the first stage, as in one process; and
    optimizers step them alike, or not at all (`tied_groups`).

    A collective of the ranks that have the same parameters.

    Arguments:
        wire: between them.
        stage: of this rank.
        named: the parameters by their names here, in an order that all stages share.
    """
    told = [json.loads(text) for text in wire.gather_objects_json(json.dumps([stage, [name for name, _ in named]]))]
    whole = [(name, p) for name, (_, p) in zip(min(told)[1], named, strict=True)]
    for name, p in whole:
        part.call(p, name)
    tied_groups.watch(wire, stage, whole)
