"""Whose gradient is not finite: found out only when the step before was bad, so that good steps pay nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fasttrain.optim.local import local
from fasttrain.parallel.over_axes import Reach

MOST = 20  # names that a rank tells


class Blame:
    """Looks at this rank's own gradients while it is on: one more read of each, before it is sent.

    A mean over ranks that is not finite no longer says who made it so. After a step with one, each rank looks at its
    gradients in the following step; if that is bad too, all ranks learn of everyone's. A good step turns it off.

    Attributes:
        on: gradients are looked at in this step; the same on every rank.
        culprits: by rank, the parameters whose gradients were not finite there, when it last was on in a bad step.
    """

    def __init__(self) -> None:
        self.on = False
        self.culprits: dict[int, list[str]] = {}
        self._seen: list[tuple[str, Tensor]] = []

    def look(self, name: str, grad: Tensor | None) -> None:
        """Look at a gradient that is about to be sent."""
        if grad is not None:
            self._seen.append((name, torch.isfinite(grad).all()))

    def ended(self, reach: Reach, nonfinite: int) -> None:
        """A step is over, and all ranks know whether it was bad."""
        if self.on and nonfinite:
            mine = [name for name, finite in self._seen if not finite][:MOST]
            told: list[Any] = [(reach.number, mine)]
            for wire in [reach.wire, *([reach.across] if reach.across else [])]:
                told = [one for text in wire.gather_objects_json(json.dumps(told)) for one in json.loads(text)]
            self.culprits = {rank: names for rank, names in sorted(told) if names}
        self._seen.clear()
        self.on = bool(nonfinite)


def nonfinite(names: Sequence[str], params: Sequence[Tensor]) -> list[str]:
    """The parameters whose gradients, as far as they lie here, are not finite now."""
    return [name for name, p in zip(names, params, strict=True)
            if p.grad is not None and not torch.isfinite(local(p.grad)).all()]
