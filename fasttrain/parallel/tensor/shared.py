"""One input that several modules read, as queries, keys and values do, is brought to all ranks once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Shared:
    """The last input that was brought to the columns inside of one module, until that module returns."""

    def __init__(self) -> None:
        self.last: tuple[Tensor, int, bool, Tensor] | None = None

    def bring(self, x: Tensor, how: Callable[[Tensor], Tensor]) -> Tensor:
        """What `how` makes of the input; the same tensor if it is the one of the call before."""
        version, graph = 0 if x.is_inference() else x._version, torch.is_grad_enabled()
        if self.last is None or self.last[0] is not x or self.last[1:3] != (version, graph):
            self.last = (x, version, graph, how(x))
        return self.last[3]

    def forget(self, *_: Any) -> None:
        """A forward hook of the module around the columns: it holds no tensor for longer."""
        self.last = None
