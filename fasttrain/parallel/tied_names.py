"""One name for random draws of a parameter that several stages have, each by a name of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence

from torch import Tensor

from fasttrain.dist.wire import Wire
from fasttrain.optim import part


def settle(wire: Wire, stage: int, named: Sequence[tuple[str, Tensor]]) -> None:
    """Let stochastic rounding draw alike for all copies: by the names on the first stage, as in one process.

    A collective of the ranks that have the same parameters.

    Arguments:
        wire: between them.
        stage: of this rank.
        named: the parameters by their names here, in an order that all stages share.
    """
    told = [json.loads(text) for text in wire.gather_objects_json(json.dumps([stage, [name for name, _ in named]]))]
    for name, (_, p) in zip(min(told)[1], named, strict=True):
        part.call(p, name)
