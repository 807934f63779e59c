"""Cross-entropy of logits whose classes are divided over ranks: one collective, and nobody holds all logits."""

from __future__ import annotations

from torch import Tensor

from fasttrain.dist.wire import Wire
from fasttrain.kernels.cross_entropy import Terms
from fasttrain.losses.checks import check_logits, check_numbers, check_targets
from fasttrain.losses.cross_entropy import check_can_be_written
from fasttrain.losses.function import CrossEntropyFunction, Gather


def vocab_parallel_cross_entropy(local_logits: Tensor, targets: Tensor, first: int, vocabulary: int,
                                 wire: Wire | Gather, *, label_smoothing: float = 0.0, z_loss: float = 0.0,
                                 ignore_index: int = -100, reduction: str = "mean",
                                 inplace_backward: bool = False) -> Tensor:
    """The cross-entropy of logits of which every rank has the columns of some classes.

    Each rank passes over its columns once and learns of each row the largest logit, the sum of exponentials, the
    target's logit and, for smoothing, the sum of logits: 20 bytes (40 of float64), which one collective gathers. All
    ranks combine them in the order of ranks, so that all have the same bits of the loss. Backward communicates nothing:
    the derivative by the own columns is written from the own columns.

    Arguments:
        local_logits: of shape (..., columns), the columns of this rank; there may be none. Of columns that only pad the
            vocabulary give a view without them, ``logits[..., :columns]``: it is not copied.
        targets: of shape (...), the same on all ranks: classes of the whole vocabulary.
        first: the class of the first column here.
        vocabulary: how many classes there are on all ranks.
        wire: a `fasttrain.dist.wire.Wire` over the ranks that divide the vocabulary; or a function that, given a tensor
            of every rank, returns (ranks, *shape), the same on each.
        label_smoothing, z_loss, ignore_index, reduction, inplace_backward: as of `cross_entropy`.

    Returns:
        The loss, the same on every rank.

    Raises:
        IndexError: as `cross_entropy`, on every rank, and before anything is sent.

    Example:
        >>> import torch
        >>> logits = torch.randn(4, 10, requires_grad=True)
        >>> targets = torch.tensor([0, 9, -100, 4])
        >>> alone = vocab_parallel_cross_entropy(logits, targets, 0, 10, lambda parts: parts[None])
        >>> torch.allclose(alone, torch.nn.functional.cross_entropy(logits, targets))
        True

    Reference: Shoeybi et al., Megatron-LM, arXiv 1909.08053, section 3, which takes three collectives.
    """
    check_numbers(label_smoothing, z_loss, reduction)
    check_logits(local_logits, "local_logits")
    check_targets(local_logits, targets, "local_logits")
    columns = local_logits.shape[-1]
    if not 0 <= first <= first + columns <= vocabulary:
        raise ValueError(f"columns of classes {first} to {first + columns - 1} do not lie in a vocabulary of "
                         f"{vocabulary}: give the class of the first column, the number of all classes, and a view "
                         "without padding")
    if inplace_backward and local_logits.requires_grad:
        check_can_be_written(local_logits)
    terms = Terms(first, vocabulary, ignore_index, label_smoothing, z_loss)
    return CrossEntropyFunction.apply(local_logits, targets, terms, reduction, inplace_backward, _gather_of(wire))[0]


def _gather_of(wire: Wire | Gather) -> Gather:
    if isinstance(wire, Wire):
        return lambda tensor: wire.all_gather_async(tensor).wait()
    return wire
