"""Parameters on their way to all ranks after a step, while the next forward pass may have begun.

With `overlap` a module waits, before its forward, for the parameters that it may use:

- a *block*, which is an element of a ModuleList, ModuleDict or Sequential, and every module inside a block: its own
  parameters and those of all modules in it;
- every other module, the model itself first of all: those of its modules that are in no block.

So a module may use the parameters of its parts without calling these (torch's MultiheadAttention does), but a block is
called before its parameters are read. Whatever else reads parameters after `step` (an average of the weights that is
kept by hand, a histogram, `state_dict` of the bare model) calls `Zero.gather` first, or does without `overlap`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from fasttrain.parallel.zero_buckets import Memory
from fasttrain.parallel.zero_wire import gather

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class Gathering:
    """All-gathers of the memories of parameters.

    Arguments:
        memories: in the order in which their gradients arrive; forward passes use them the other way round.
        module: whose modules wait for their parameters; None: `start` waits for all.
    """

    def __init__(self, memories: Sequence[Memory], module: nn.Module | None = None):
        self.memories = list(memories)
        self.works: dict[int, Any] = {}
        self.overlap = module is not None
        if module is not None:
            self._watch(module)

    def start(self) -> None:
        """Send all memories."""
        for index in reversed(range(len(self.memories))):
            memory = self.memories[index]
            self.works[index] = gather(memory.wire, memory.flat, memory.cut)
        if not self.overlap:
            self.wait()

    def wait(self, needed: Sequence[int] | None = None) -> None:
        """Wait for some memories, or for all."""
        for index in list(self.works) if needed is None else needed:
            if (work := self.works.pop(index, None)) is not None:
                work.wait()

    def _watch(self, module: nn.Module) -> None:
        module.register_state_dict_pre_hook(lambda *_: self.wait())
        module.register_load_state_dict_pre_hook(lambda *_: self.wait())  # what is loaded is not overwritten
        place = {p: index for index, memory in enumerate(self.memories) for p in memory.params}
        inside: set[nn.Module] = set()
        for part in module.modules():
            if isinstance(part, CONTAINERS):
                for block in part.children():
                    inside.update(block.modules())
        for part in module.modules():
            mine = part.modules() if part in inside else (one for one in part.modules() if one not in inside)
            used = {place[p] for one in mine for p in one.parameters(recurse=False) if p in place}
            needed = sorted(used, reverse=True)  # as they were sent
            if needed:
                part.register_forward_pre_hook(partial(self._before, needed), prepend=True)

    @torch._disable_dynamo
    def _before(self, needed: Sequence[int], module: nn.Module, inputs: Any) -> None:
        if self.works:
            self.wait(needed)
