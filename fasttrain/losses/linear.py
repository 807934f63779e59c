"""A linear layer and its cross-entropy, in chunks of rows: all logits at once never exist."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fasttrain.kernels.cross_entropy import Terms
from fasttrain.losses.checks import check_logits, check_numbers, check_targets, spelled
from fasttrain.losses.linear_ops import linear_cross_entropy as operator
from fasttrain.losses.placed import Classes, classes_of, is_dtensor, local_targets, rows_cut

if TYPE_CHECKING:
    from fasttrain.dist.wire import Wire

ROWS = {"cpu": 256}  # of a chunk, at least: fewer leave the matrix product waiting for the weights
ROWS_ELSEWHERE = 1024


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *,
                         chunk: int | None = None, label_smoothing: float = 0.0, z_loss: float = 0.0,
                         ignore_index: int = -100, reduction: str = "mean", wire: Wire | None = None) -> Tensor:
    """``cross_entropy(linear(hidden, weight, bias), targets)`` in a fraction of the memory.

    The logits of `chunk` rows are made, measured, turned into their derivative where they lie, and multiplied into the
    derivatives of `hidden`, `weight` and `bias`, all in the forward pass; backward multiplies these by the incoming
    derivative. With ``reduction="none"`` every row has its own, which comes too late for that: the forward pass keeps
    20 bytes a row, and backward makes the logits again.

    Arguments:
        hidden: of shape (..., H).
        weight: of shape (V, H), of the same dtype. Its derivative is added up in float32. A DTensor may be cut by
            classes, Shard(0), along one dimension of its mesh, the bias then too; see below.
        bias: of shape (V,), or None.
        chunk: rows at a time. None: as many as make the logits of a chunk as large as `hidden`, but 256 at least on a
            CPU and 1,024 elsewhere.
        targets, label_smoothing, z_loss, ignore_index, reduction, wire: as of `fasttrain.losses.cross_entropy`.

    Of a weight cut by classes every rank makes the logits of its own, and gathers 20 bytes a row and rank chunk by
    chunk. `hidden` is the same on all ranks, and its derivative is summed over them in one all-reduce; or it is a
    DTensor cut along any but its last dimension (sequence parallel), whose rows are gathered, and their derivatives
    scattered, with each chunk. The loss is a plain tensor with the same bits on all ranks; derivatives are placed as
    what they belong to.

    Under autocast `hidden`, `weight` and `bias` are taken in its dtype, as `torch.nn.functional.linear` does.

    Example:
        >>> hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(10, 4, requires_grad=True)
        >>> loss = linear_cross_entropy(hidden, weight, torch.arange(6), chunk=2)
        >>> torch.allclose(loss, torch.nn.functional.cross_entropy(hidden @ weight.T, torch.arange(6)))
        True

    Reference: derivatives made chunk by chunk in the forward pass, Hsu et al., Liger Kernel, arXiv 2410.10989, section
    3.2; a loss that never holds the logits, Wijmans et al., Cut Your Losses, arXiv 2411.09009.
    """
    check_numbers(label_smoothing, z_loss, reduction)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}: it is a number of rows, 1 or more")
    shape, targets = hidden.shape[:-1], local_targets(targets)
    classes, dim = Classes(weight, 0, len(weight), None), None
    if is_dtensor(weight):
        classes = classes_of(weight, 0, "weight", wire)
        dim, hidden = rows_cut(hidden, weight, classes.along)
        if bias is not None:
            bias = classes_of(bias, 0, "bias", wire).local if is_dtensor(bias) else bias
    elif wire is not None:
        raise TypeError("a wire is for a weight cut by classes, a DTensor placed Shard(0), and this is none: leave it "
                        "out, or distribute the weight")
    weight = classes.local
    _check(hidden, weight, bias)
    check_targets(hidden if dim is None else hidden.new_empty(0).expand(*shape, 0), targets, "hidden")
    rows = targets.numel()
    if chunk is None:
        ranks = 1 if classes.along is None else classes.along.size
        same = -(-rows * weight.shape[1] // max(-(-classes.vocabulary // ranks), 1))
        chunk = max(same, ROWS.get(hidden.device.type, ROWS_ELSEWHERE))
    chunk = min(chunk, max(rows, 1))
    grad = torch.is_grad_enabled()
    needed = [grad and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)]
    if classes.along is not None:
        from fasttrain.losses.linear_parallel import How, LinearCrossEntropy

        terms = Terms(classes.first, classes.vocabulary, ignore_index, label_smoothing, z_loss)
        how = How(classes.along, dim, chunk, terms, reduction, needed)
        return LinearCrossEntropy.apply(hidden, weight, bias, targets, how)
    return operator(hidden, weight, bias, targets, chunk, label_smoothing, z_loss, ignore_index, reduction, needed)[0]


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_logits(tensor, name)
            if tensor.dtype != hidden.dtype or tensor.device != hidden.device:
                raise TypeError(f"hidden is {spelled(hidden)} on {hidden.device}, {name} {spelled(tensor)} on "
                                f"{tensor.device}: they must be the same")
    if weight.dim() != 2 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden of shape {tuple(hidden.shape)} and weight of shape {tuple(weight.shape)}: a weight "
                         "is (classes, features), with the features that hidden has last")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias of shape {tuple(bias.shape)}, and weight of shape {tuple(weight.shape)}: the bias "
                         "has one number for each class")
