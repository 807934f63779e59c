"""Styles of layers whose rows are tokens: each rank has an interval of the vocabulary.

Nothing is padded: rank r of t has the rows from ``r ceil(V / t)`` on, up to ``ceil(V / t)`` of them, so the last ranks
may have fewer, or none. The shape of the parameter, which checkpoints and norms see, is that of the undivided model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from fasttrain.parallel.tensor.moves import Move
from fasttrain.parallel.tensor.styles import Site, Style


def first_of(mesh: Any, vocabulary: int) -> int:
    """The first row of this rank; the number of all if it has none."""
    return min(-(-vocabulary // mesh.size()) * mesh.get_local_rank(), vocabulary)


class Lookup(Style):
    """An Embedding: tokens of other ranks give zeros here.

    Arguments:
        output: what makes the output of the addends; None to leave them to the module that calls this one.
    """

    def __init__(self, output: Move | None):
        super().__init__(None, output)

    def cuts(self, module: nn.Module) -> dict[str, Placement]:
        return {"weight": Shard(0)}

    def problem(self, module: nn.Module, size: int) -> str | None:
        if not isinstance(module, nn.Embedding):
            return (f"a {type(module).__name__} has no rows of tokens: torch's Embedding can be \"vocabulary\", and "
                    "the Linear that gives the logits")
        for option in ("max_norm", "sparse", "scale_grad_by_freq"):
            if getattr(module, option):
                return f"it has {option}={getattr(module, option)}, which needs all rows on one rank: leave it out"
        return None

    def compute(self, at: Site, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tokens, = (*args, *kwargs.values())
        vocabulary = len(at.module.weight)
        return looked_up(tokens, at.local("weight"), first_of(at.mesh, vocabulary), vocabulary, at.module.padding_idx)


def looked_up(tokens: Tensor, rows: Tensor, first: int, vocabulary: int, padding: int | None = None) -> Tensor:
    """The rows of tokens from `first` on, and zeros for those before and behind.

    Raises:
        IndexError: a token is none of the vocabulary; on every rank (on a GPU, as ever, by an assertion there).

    Example:
        >>> import torch
        >>> looked_up(torch.tensor([0, 2, 3]), torch.tensor([[5.0], [7.0]]), first=2, vocabulary=4).tolist()
        [[0.0], [5.0], [7.0]]
    """
    last = first + len(rows)
    elsewhere = ((tokens >= 0) & (tokens < first)) | ((tokens >= last) & (tokens < vocabulary))
    own = tokens - first
    if not len(rows):  # of which nothing can be looked up: one row of zeros, and all that is in no vocabulary behind it
        rows, own = F.pad(rows, (0, 0, 0, 1)), own + 1
    padding = padding - first if padding is not None and first <= padding < last else None
    found = F.embedding(own.masked_fill(elsewhere, 0), rows, padding)
    return found.masked_fill(elsewhere[..., None], 0.0)


class Head(Style):
    """The Linear that gives logits: each rank those of its tokens.

    Arguments:
        input: what brings the input to all ranks; None if it has been brought to the module that calls this one.
        whole: every rank gets all logits, as a plain tensor; if not, they are a DTensor placed Shard(-1).
    """

    def __init__(self, input: Move | None, whole: bool):
        super().__init__(input)
        self.whole = whole

    def cuts(self, module: nn.Module) -> dict[str, Placement]:
        return {name: Shard(0) for name, _ in module.named_parameters()}

    def problem(self, module: nn.Module, size: int) -> str | None:
        return None if isinstance(module, nn.Linear) else f"a {type(module).__name__} gives no logits"

    def finish(self, at: Site, output: Any) -> Any:
        shape = torch.Size((*output.shape[:-1], len(at.module.weight)))
        stride = output.new_empty(shape, device="meta").stride()
        logits = DTensor.from_local(output, at.mesh, [Shard(output.ndim - 1)], run_check=False, shape=shape,
                                    stride=stride)
        if not self.whole:
            return logits
        return logits.redistribute(placements=[Replicate()]).to_local(grad_placements=[Replicate()])
