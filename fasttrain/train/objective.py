"""What a model of the main job is trained for, and measured by: cross-entropy, however its logits are divided."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.dist.wire import Wire
from fasttrain.losses import cross_entropy

IGNORED = -100  # a target that does not count


def loss_of(model: nn.Module, windows_BT1: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """Mean cross-entropy in nats per byte (or token), over windows of shape (B, T + 1): see `loss_of_logits`.

    Inputs and targets overlap by T - 1. Where ranks divide positions it is the mean over those of this rank. What
    mixtures of experts add to it is in it.
    """
    logits, targets = model(windows_BT1[:, :-1]), windows_BT1[:, 1:]
    loss = loss_of_logits(logits, own_positions(model, targets), label_smoothing, z_loss, wire_of(model))
    return loss + auxiliary(model) if getattr(model, "experts", 0) else loss


def auxiliary(model: nn.Module) -> Tensor:
    """What the mixtures of experts in a model add to its loss."""
    from fasttrain.parallel.experts import auxiliary as of_mixtures

    return of_mixtures(model)


def wire_of(model: nn.Module) -> Wire | None:
    """To the ranks that divide the vocabulary of a model: what `fasttrain.train.division` has told it."""
    return getattr(model, "loss_wire", None)


def own_positions(model: nn.Module, targets_BT: Tensor) -> Tensor:
    """The targets of the positions that this rank computes: all, unless ranks divide them (`GPT.context`)."""
    context = getattr(model, "context", None)
    return targets_BT if context is None else context.cut(targets_BT, 1)


def loss_of_logits(logits: Tensor, targets_BT: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0,
                   wire: Wire | None = None) -> Tensor:
    """Mean cross-entropy of a model's logits; `wire`: to the ranks that divide their vocabulary.

    With label smoothing or a z-loss, which are in the mean then, and of logits that ranks divide by vocabulary, it is
    `fasttrain.losses.cross_entropy`, whose derivative is written over the logits; else torch's.
    """
    if label_smoothing or z_loss or hasattr(logits, "placements"):
        return cross_entropy(logits, targets_BT, label_smoothing=label_smoothing, z_loss=z_loss, wire=wire,
                             inplace_backward=torch.is_grad_enabled())
    return F.cross_entropy(logits.flatten(0, 1).float(), targets_BT.flatten())


def nats_of_logits(logits: Tensor, targets_BT: Tensor, wire: Wire | None = None) -> Tensor:
    """The sum of the cross-entropies of all positions whose target is none of `IGNORED`: float64, of shape ()."""
    if hasattr(logits, "placements"):
        nats = cross_entropy(logits, targets_BT, ignore_index=IGNORED, reduction="none", wire=wire)
    else:
        nats = F.cross_entropy(logits.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORED,
                               reduction="none")
    return nats.sum(dtype=torch.float64)
