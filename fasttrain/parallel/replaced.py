"""An optimizer that was made before its parameters were replaced by shards would step nothing, without a word."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fasttrain.parallel import steps

_of_models: weakref.WeakKeyDictionary[nn.Module, Replaced] = weakref.WeakKeyDictionary()


class Replaced:
    """Parameters that a model no longer has; `fasttrain.parallel.steps` asks before an optimizer steps any of them."""

    sequence = 0

    def __init__(self, params: Iterable[Tensor]):
        self.params = WeakTensorKeyDictionary()  # they are not to live on for this
        for p in params:
            self.params[p] = None

    def finish(self) -> None:
        """An optimizer is about to step them.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("this optimizer has parameters from before shard() replaced them, and would step nothing: "
                           "make the optimizer after shard(), of model.parameters()")

    before_step = finish


def watch(model: nn.Module, params: Iterable[Tensor]) -> None:
    """`params` were the model's own until now."""
    left = set(model.parameters())
    _of_models[model] = gone = Replaced(p for p in params if p not in left)
    steps.watch(gone)
