"""The losses of mixtures of experts in a pipeline, of whose stages only the last has a loss to add them to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fasttrain.precision.loss_scale import LossScaler


class Mixtures:
    """Has backward passes carry the losses of the mixtures in some stages, and adds up what they were.

    Arguments:
        model: the stages of this rank.
        weight: what a micro-batch's losses are multiplied with; None: somebody else sees to them.
    """

    def __init__(self, model: nn.Module, weight: float | None):
        self.model, self.weight = model, weight

    def begin(self, scaler: LossScaler | None, device: torch.device) -> None:
        """A step begins, with the loss scale that it will have."""
        if self.weight is not None:
            from fasttrain.parallel.experts import carry

            carry(self.model, self.weight if scaler is None else scaler.scale_on(device) * self.weight)

    def losses(self) -> Tensor | float:
        """The weighted sum of those that the backward passes of a step have carried, without the loss scale."""
        if self.weight is None:
            return 0.0
        from fasttrain.parallel.experts.collected import carried

        return carried(self.model) * self.weight
