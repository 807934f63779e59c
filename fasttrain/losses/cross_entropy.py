"""Cross-entropy in two passes over the logits: a drop-in for `torch.nn.functional.cross_entropy`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from fasttrain.kernels.cross_entropy import Terms
from fasttrain.losses import ops
from fasttrain.losses.checks import check_logits, check_numbers, check_targets
from fasttrain.losses.function import CrossEntropyFunction
from fasttrain.losses.placed import classes_of, is_dtensor, local_targets

if TYPE_CHECKING:
    from fasttrain.dist.wire import Wire


class CrossEntropyParts(NamedTuple):
    """A loss and what else the same pass tells. Only the loss has a derivative.

    Attributes:
        loss: as `cross_entropy` gives it.
        rows: each row's cross-entropy, label smoothing included, z-loss not; 0 where it is ignored.
        z: each row's z-loss.
        counted: rows that are not ignored, int64.
        correct: of those, the rows whose target has the largest logit (ties count), int64.
    """

    loss: Tensor
    rows: Tensor
    z: Tensor
    counted: Tensor
    correct: Tensor


def cross_entropy(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0,
                  ignore_index: int = -100, reduction: str = "mean", inplace_backward: bool = False,
                  wire: Wire | None = None) -> Tensor:
    r"""The cross-entropy of logits and indices of classes.

    .. math::
        \ell = (1 - \varepsilon) (L - x_t) + \varepsilon (L - \tfrac1V \textstyle\sum_i x_i) + z L^2,
        \quad L = \log \textstyle\sum_i e^{x_i}

    The forward pass reads the logits once; the backward pass reads them once and writes their derivative once. Nothing
    as large as the logits is kept between them.

    Arguments:
        logits: of shape (..., V); float32, bfloat16 or float16, computed in float32; or float64, in eager torch. The
            rows of a view such as ``logits[:, :-1]`` are read where they lie. A DTensor may be cut by classes,
            Shard(-1), along one dimension of its mesh: then as `fasttrain.losses.vocab_parallel_cross_entropy`, with
            one collective, and the derivative is a DTensor placed as the logits.
        targets: of shape (...), int64, int32 or uint8.
        label_smoothing: :math:`\varepsilon`, as torch defines it.
        z_loss: :math:`z`, 0 for none: what keeps :math:`L` near 0.
        ignore_index: the target of rows that do not count. Their derivative is zero, whatever their logits.
        reduction: "mean" over the rows that count (NaN if there are none, as in torch), "sum", or "none".
        inplace_backward: write the derivative over the logits, which saves as much memory. Whatever else would read
            them in the backward pass raises.
        wire: for logits cut by classes, over the ranks that have them; None for their mesh's own group.

    Returns:
        The loss, a plain tensor, in float32 (float64 of float64 logits): in 16 bits a loss of 10 has two or three
        digits. Where classes are divided, the same bits on every rank.

    Raises:
        IndexError: a target in CPU memory is no class. On a GPU, which nobody waits for, the losses and derivatives of
            such rows are NaN.
        NotImplementedError: a second derivative is asked for.
        TypeError, ValueError: arguments that do not fit each other.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 9.0]], requires_grad=True)
        >>> loss = cross_entropy(logits, torch.tensor([0, -100]))
        >>> loss.backward()
        >>> loss, logits.grad
        (tensor(0.4076, grad_fn=...), tensor([[-0.3348,  0.2447,  0.0900],
            [ 0.0000,  0.0000,  0.0000]]))

    Reference: label smoothing, Szegedy et al., arXiv 1512.00567, section 7; z-loss, Chowdhery et al., PaLM, arXiv
    2204.02311, section 5; sums in one pass, Milakov and Gimelshein, arXiv 1805.02867.
    """
    return _outputs(logits, targets, label_smoothing, z_loss, ignore_index, reduction, inplace_backward, wire)[0]


def cross_entropy_parts(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0,
                        ignore_index: int = -100, reduction: str = "mean", inplace_backward: bool = False,
                        wire: Wire | None = None) -> CrossEntropyParts:
    """`cross_entropy`, and what else its one pass tells.

    Example:
        >>> import torch
        >>> found = cross_entropy_parts(torch.tensor([[2.0, 1.0], [0.0, 9.0]]), torch.tensor([0, 0]), z_loss=1e-4)
        >>> int(found.counted), int(found.correct)
        (2, 1)
    """
    loss, *others = _outputs(logits, targets, label_smoothing, z_loss, ignore_index, reduction, inplace_backward, wire)
    return CrossEntropyParts(loss, *(other.detach() for other in others))


def _outputs(logits: Tensor, targets: Tensor, label_smoothing: float, z_loss: float, ignore_index: int, reduction: str,
             inplace_backward: bool, wire: Wire | None) -> Sequence[Tensor]:
    check_numbers(label_smoothing, z_loss, reduction)
    if inplace_backward and logits.requires_grad:
        check_can_be_written(logits)
    first, vocabulary, along = 0, logits.shape[-1] if logits.dim() else 0, None
    if is_dtensor(logits):
        targets = local_targets(targets)
        logits, first, vocabulary, along = classes_of(logits, -1, "logits", wire)
    elif wire is not None:
        raise TypeError("a wire is for logits cut by classes, a DTensor placed Shard(-1), and these are no DTensor: "
                        "leave it out, or call vocab_parallel_cross_entropy")
    check_logits(logits)
    check_targets(logits, targets)
    if along is None and (type(logits) not in (Tensor, Parameter) or torch.compiler.is_compiling()):
        *found, _ = ops.cross_entropy(logits, targets, label_smoothing, z_loss, ignore_index, reduction,
                                      inplace_backward)
        return found
    terms = Terms(first, vocabulary, ignore_index, label_smoothing, z_loss)
    gather = None if along is None else along.gather
    return CrossEntropyFunction.apply(logits, targets, terms, reduction, inplace_backward, gather)


def check_can_be_written(logits: Tensor) -> None:
    """Raise ValueError if logits cannot be written over."""
    if logits.is_leaf:
        raise ValueError("inplace_backward=True would write over logits that are a leaf, whose value would be lost: "
                         "leave it out, or give what was computed from them")
    if any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True)):
        raise ValueError(f"inplace_backward=True cannot write logits of shape {tuple(logits.shape)} and strides "
                         f"{logits.stride()}: elements share memory; leave it out, or clone them")
