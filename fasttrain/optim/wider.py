"""Norms that are wider than an optimizer: of parameters of which other processes hold others of the same model.

A stage of a pipeline has some of the parameters only, and the norm to which all are clipped is that of the whole model.
Whoever divides a model so declares it here; `clip_grad_norm_`, `LossScaler` and what else asks for the statistics of
gradients then gets those of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# From parameters, the sums of squares of this process's parts of their gradients (float64, of one dimension), and
# whether any of these is not finite, to both over the whole model: a collective.
Widened = Callable[[Sequence[Tensor], Tensor, Tensor], tuple[Tensor, Tensor]]

_declared: WeakIdKeyDictionary = WeakIdKeyDictionary()


def declare(params: Iterable[Tensor], widened: Widened) -> None:
    """Let the norm of these parameters' gradients be that of a whole model."""
    for p in params:
        _declared[p] = widened


def declared(params: Sequence[Tensor]) -> Widened | None:
    """What makes the norm of these parameters wider; None if nothing does.

    Raises:
        ValueError: only some are of such a model, or they are of several.
    """
    if not _declared or not params:
        return None
    found = {id(one): one for one in map(_declared.get, params)}
    if len(found) > 1:
        raise ValueError(f"{sum(p in _declared for p in params)} of {len(params)} parameters belong to a model that is "
                         "divided over a mesh, the others to none or to another: there is no norm of all of them "
                         "together; give their optimizers one after the other")
    (one,) = found.values()
    return one
