"""The losses of mixtures on their way into the training loss: each forward pass counts once, or the step fails.

A layer hands its losses over in a slip of paper that its output's graph holds. `auxiliary` takes the slips of the
forward passes since it was last called, and they are derived with the loss that they are added to. Backward of the
output looks whether its slip was taken, and raises if it was not. A pass whose graph is dropped takes its slip along,
and so does one that recomputes activations, whose graph nobody derives. Where a loss cannot be added, as in a stage of
a pipeline that is not the last, `carry` lets backward of the output begin that of the losses, too.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

FORGOTTEN = ("backward came to a mixture of experts whose losses nobody has added: add auxiliary(model) to the loss "
             "before backward, or call carry(model), or make the layer with balance=0 and z=0")
REENTRANT = ("the losses of a mixture of experts are not in the graph, as its forward pass ran without one "
             "(checkpoint(use_reentrant=True)): use checkpoint(use_reentrant=False), or call carry(model)")


class Slip:
    """The losses of one forward pass.

    Attributes:
        loss: their weighted sum, of shape ().
        taken: whether it was added to a loss.
        again: whether the pass repeats one inside of a backward pass.
        counted: whether a backward pass that carried it has come by.
    """

    def __init__(self, loss: Tensor | None, again: bool):
        self.loss, self.taken, self.again, self.counted = loss, False, again, False


class Box:
    """Where a layer leaves its slips; they live as long as the graphs of its outputs.

    Attributes:
        scale: what the derivatives of the losses are multiplied with if they are carried; None if they are not.
        carried: the sum of those that were, float64 of shape (); `carried` takes it.
    """

    def __init__(self) -> None:
        self.scale: float | Tensor | None = None
        self.carried: Tensor | None = None
        self._slips: list[weakref.ref[Slip]] = []

    def __deepcopy__(self, memo: Any) -> Box:
        return Box()

    def __reduce__(self) -> tuple[Any, ...]:
        return Box, ()

    def attach(self, output: Tensor, loss: Tensor) -> Tensor:
        """The output, whose graph holds the loss from now on."""
        if not (torch.is_grad_enabled() and loss.requires_grad):
            return output
        slip = Slip(loss, torch._C._current_graph_task_id() != -1)
        if self.scale is None:
            self._slips = [kept for kept in self._slips if kept() is not None]
            self._slips.append(weakref.ref(slip))
        return _Attached.apply(output, loss, slip, self)

    def take(self) -> list[Tensor]:
        """The losses that nobody has taken."""
        found = [slip for kept in self._slips if (slip := kept()) is not None]
        self._slips = []
        for slip in found:
            slip.taken = True
        return [slip.loss for slip in found if slip.loss is not None]


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, slip: Slip, box: Box) -> Tensor:
        ctx.slip, ctx.box = slip, box
        return shaped(output, output.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slip, scale = ctx.slip, ctx.box.scale
        if slip.taken:
            return grad, None, None, None
        if scale is None:
            raise RuntimeError(REENTRANT if slip.again else FORGOTTEN)
        box = ctx.box
        if not slip.counted:
            slip.counted, value = True, slip.loss.detach().double().reshape(())
            box.carried = value if box.carried is None else box.carried + value
        by_loss = scale.to(slip.loss) if isinstance(scale, Tensor) else slip.loss.new_full((), scale)
        return grad, by_loss.reshape(()), None, None


def shaped(tensor: Tensor, shape: torch.Size) -> Tensor:
    """The same memory in that shape, which nobody else uses.

    To autograd it is no view, as outputs of torch's own layers are none: `fully_shard` warns of those.
    """
    return torch.ops.aten._unsafe_view(tensor, shape)


class Boxed(nn.Module):
    """A layer with losses.

    Attributes:
        box: where it leaves them.
        weighted: whether there are any.
    """

    box: Box
    weighted: bool


def boxed(model: nn.Module) -> list[Boxed]:
    """The layers of a model that have losses, each once."""
    return [part for part in model.modules() if isinstance(part, Boxed)]


def auxiliary(model: nn.Module) -> Tensor:
    """The weighted losses of all mixtures in a model, of every forward pass since the last call, to be added to a loss.

    Call it once after the forward pass of each micro-batch, and divide the sum by what the loss is divided by:

        loss = cross_entropy(model(x), y) + auxiliary(model)

    Returns:
        Of shape (): float32 (float64 for float64 tokens). Zero where gradients are off, or all weights are zero.

    Raises:
        RuntimeError: there are no losses, as they were taken before, or the forward pass ran in a reentrant checkpoint;
            or they are carried.
        ValueError: no part of the model is a mixture.
    """
    found = boxed(model)
    if not found:
        raise ValueError("no part of the model is a MoE: leave auxiliary(model) out")
    if any(part.box.scale is not None for part in found):
        raise RuntimeError("the losses are carried (`carry`), and would count twice: do not add them to the loss, or "
                           "call carry(model, None)")
    losses = [loss for part in found for loss in part.box.take()]
    trained = any(part.weighted and any(p.requires_grad for p in part.parameters()) for part in found)
    if not losses and trained and torch.is_grad_enabled():
        raise RuntimeError("there are no losses of mixtures: no forward pass with gradients has run since they were "
                           f"taken, or {REENTRANT}")
    if not losses:
        return torch.zeros(())
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss.to(total.device)
    return total


def carry(model: nn.Module, scale: float | Tensor | None = 1.0) -> None:
    """Let backward of each mixture's output begin that of its losses, with `scale` in the place of ones.

    For pipelines, whose stages have no loss to add to but the last. Every backward pass through an output counts its
    losses once, in any schedule, also where activations are recomputed.

    Arguments:
        scale: what the training loss is multiplied with before backward: ``1 / micro_batches``, times the loss scale.
            A tensor is read in backward: write to it what has changed. None: losses are for `auxiliary` again.

    Example:
        >>> from fasttrain.parallel.experts import MoE
        >>> layer = MoE(8, 16, experts=4)
        >>> carry(layer, 1 / 4)
        >>> layer(torch.randn(5, 8)).sum().backward()
    """
    for part in boxed(model):
        part.box.scale = scale


def carried(model: nn.Module) -> Tensor:
    """The sum of the losses that backward passes have carried since the last call, float64 of shape ()."""
    total = torch.zeros((), dtype=torch.float64)
    for part in boxed(model):
        if part.box.carried is not None:
            total = total.to(part.box.carried.device) + part.box.carried
        part.box.carried = None
    return total
