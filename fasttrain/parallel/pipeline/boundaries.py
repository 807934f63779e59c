"""What travels from stage to stage: shapes and dtypes, found by one forward pass of a micro-batch without gradients.

torch's stages can find them too, by a forward and a backward pass of their own; told in advance they do neither, so no
gradient arrives before the first step, and no loss is computed twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasttrain.dist.wire import Wire
from fasttrain.optim.local import is_dtensor
from fasttrain.parallel.pipeline.held import Held


class Boundary(NamedTuple):
    """What one stage gives to the next.

    Attributes:
        tensors: shape, name of the dtype, and whether a gradient comes back, of each tensor.
        single: it is one tensor, not a tuple of one.
    """

    tensors: list[tuple[list[int], str, bool]]
    single: bool

    @classmethod
    def of(cls, given: Any, needs_grad: bool) -> Boundary:
        """That of the output of a stage.

        Raises:
            TypeError: it is neither a tensor nor a tuple of tensors.
        """
        single = isinstance(given, Tensor)
        tensors = [given] if single else list(given) if isinstance(given, (tuple, list)) else []
        if not tensors or not all(isinstance(t, Tensor) for t in tensors):
            raise TypeError(f"it gives {type(given).__name__}: what goes to the next stage is a tensor or a tuple of "
                            "tensors")
        if any(is_dtensor(t) for t in tensors):
            raise TypeError("it gives a DTensor: let what goes to the next stage be local (use_local_output=True)")
        return cls([(list(t.shape), str(t.dtype).removeprefix("torch."), needs_grad and t.is_floating_point())
                    for t in tensors], single)

    def empty(self, device: torch.device | str) -> tuple[Tensor, ...]:
        """Tensors of its shapes."""
        return tuple(torch.empty(shape, dtype=getattr(torch, dtype), device=device, requires_grad=needs_grad)
                     for shape, dtype, needs_grad in self.tensors)

    def given(self, tensors: Sequence[Tensor]) -> Any:
        """The tensors as the stage before gave them."""
        return tensors[0] if self.single else tuple(tensors)


def found(wire: Wire, held: Held, model: nn.Module, run: Callable[[int, Any], Any], always: bool) -> list[Boundary]:
    """What each stage but the last gives, known on every rank of the pipeline; all of them call it.

    Arguments:
        wire: of the pipeline.
        held, model: what this rank has; its buffers are put back.
        run: a stage of this rank on what the stage before gave; the first takes None.
        always: gradients come back even where all stages before are frozen: where torch splits backward passes, it
            finds weights by the way from a stage's inputs, and without their gradient gives the weights none.

    Raises:
        RuntimeError: a stage failed; on every rank.
    """
    boundaries: list[Boundary] = []
    placement = held.placement
    with undone(model, wire.device):
        for stage in range(placement.stages - 1):
            said, failure = "", None
            if stage in held.mine:
                try:
                    before = boundaries[-1] if boundaries else None
                    given = before.given([torch.zeros_like(t) for t in before.empty(wire.device)]) if before else None
                    needs_grad = always or any(model.get_parameter(name).requires_grad for name in held.names[stage])
                    needs_grad |= before is not None and any(needs for *_, needs in before.tensors)
                    said = json.dumps(Boundary.of(run(stage, given), needs_grad))
                except Exception as error:  # told to all ranks below
                    failure = error
                    said = json.dumps({"failed": f"{type(error).__name__}: {error}"})
            told = json.loads(wire.gather_objects_json(said)[placement.rank(stage)])
            if isinstance(told, dict):
                raise RuntimeError(f"stage {stage} failed on rank {wire.ranks[placement.rank(stage)]}, in the forward "
                                   f"pass by which shapes are found: {told['failed']}") from failure
            boundaries.append(Boundary([(shape, dtype, needs) for shape, dtype, needs in told[0]], told[1]))
    return boundaries


@contextmanager
def undone(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Forward passes within leave no trace: neither in buffers nor in the generators of random numbers."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
