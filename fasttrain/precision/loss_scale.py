"""Loss scaling: gradients of half-precision numbers are kept away from zero by a factor that the step divides out.

Micikevicius et al., Mixed Precision Training (arXiv 1710.03740), section 3.2; the dynamic scale follows torch's
`GradScaler`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class LossScaler:
    """Multiplies the loss, and has the step unscale, clip and, where something is not finite, skip.

    Scale, growth count and what was found live on the device of the loss, and nothing here reads them on the host. One
    pass over the gradients finds both their norm and whether all are finite; torch's `GradScaler` needs three to
    unscale, check and clip.

    Arguments:
        init_scale: the first scale.
        dynamic: change the scale; else it stays.
        growth_factor: what the scale is multiplied with after `growth_interval` steps without a skip.
        backoff_factor: what it is multiplied with after a skip.
        growth_interval: in steps.

    Raises:
        ValueError: a factor that would not grow, or not back off.

    Example:
        >>> from fasttrain.optim import AdamW
        >>> from fasttrain.precision.loss_scale import LossScaler
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer, scaler = AdamW(model.parameters()), LossScaler()
        >>> for _ in range(3):
        ...     scaler.scale(model(torch.ones(2, 4)).sum()).backward()
        ...     norm = scaler.step(optimizer, max_norm=1.0)
        ...     optimizer.zero_grad()
        >>> scaler.get_scale()
        65536.0
    """

    def __init__(self, init_scale: float = 2.0**16, *, dynamic: bool = True, growth_factor: float = 2.0,
                 backoff_factor: float = 0.5, growth_interval: int = 2000):
        if not init_scale > 0.0:
            raise ValueError(f"init_scale is {init_scale}: it must be positive")
        if not growth_factor > 1.0 or not 0.0 < backoff_factor < 1.0 or growth_interval < 1:
            raise ValueError(f"growth_factor {growth_factor} must be above 1, backoff_factor {backoff_factor} between "
                             f"0 and 1, and growth_interval {growth_interval} at least 1")
        self.dynamic = dynamic
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
        self._scale = torch.tensor(float(init_scale))
        self._growth = torch.tensor(0, dtype=torch.int32)

    def _to(self, device: torch.device) -> None:
        if self._scale.device != device:
            self._scale, self._growth = self._scale.to(device), self._growth.to(device)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss, multiplied; call backward on it."""
        self._to(loss.device)
        return loss * self._scale.to(loss.dtype if loss.dtype == torch.float64 else torch.float32)

    def step(self, optimizers: Any, max_norm: float | None = None,
             statistics: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Step, with the gradients divided by the scale; skip, leaving everything as it was, if one is not finite.

        Arguments:
            optimizers: one of this package, or several that are stepped or skipped together.
            max_norm: clip the unscaled gradients of all to this norm.
            statistics: the sum of squares of all gradients and whether any is not finite, where they are known, as
                `fasttrain.parallel.Reducer.statistics` knows them: no gradient is read for it then.

        Returns:
            The norm of the unscaled gradients before clipping, float32 of shape ().
        """
        together = list(optimizers) if isinstance(optimizers, Iterable) else [optimizers]
        known = [statistics] if statistics else [optimizer.grad_statistics() for optimizer in together]
        device = known[0][0].device
        self._to(device)
        square = torch.stack([square.to(device) for square, _ in known]).sum()
        found = torch.stack([found.to(device) for _, found in known]).any()
        norm = square.sqrt().float() / self._scale
        for optimizer in together:
            optimizer.step_scaled(self._scale, found, norm, max_norm)
        self.update(found)
        return norm

    def scale_on(self, device: torch.device) -> Tensor:
        """The scale itself, float32 of shape (), on a device; it is not to be written to."""
        self._to(device)
        return self._scale

    def update(self, found: Tensor) -> None:
        """Change a dynamic scale after a step; `found` says whether it was skipped. On the device."""
        if self.dynamic:
            torch._amp_update_scale_(self._scale, self._growth, found.float(), self.growth_factor, self.backoff_factor,
                                     self.growth_interval)

    @property
    def scale_on_device(self) -> Tensor:
        """The scale as it is now, float32 of shape (), a copy; nothing waits for the device."""
        return self._scale.clone()

    def get_scale(self) -> float:
        """The scale as a number; waits for the device."""
        return self._scale.item()

    def state_dict(self) -> dict[str, Any]:
        """Scale and growth count, with the options that they belong to."""
        return {"scale": self._scale.clone(), "growth": self._growth.clone(), "dynamic": self.dynamic,
                "growth_factor": self.growth_factor, "backoff_factor": self.backoff_factor,
                "growth_interval": self.growth_interval}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ValueError: an entry is missing; nothing was changed.
        """
        names = ("scale", "growth", "dynamic", "growth_factor", "backoff_factor", "growth_interval")
        if missing := [name for name in names if name not in state]:
            raise ValueError(f"the state has no {', '.join(missing)}: it is not one of a LossScaler")
        self._scale, self._growth = state["scale"].clone(), state["growth"].clone()
        for name in names[2:]:
            setattr(self, name, state[name])


def step_divided(divisor: Tensor, statistics: tuple[Tensor, Tensor], optimizer: Any, max_norm: float | None,
                 scaler: LossScaler | None) -> Tensor:
    """Step an optimizer with its gradients divided by a number that is known late, and by a loss scale.

    Arguments:
        divisor: float64 of shape (): items, for example.
        statistics: of the gradients as they are; see `LossScaler.step`.
        optimizer: has `step_scaled`.
        max_norm: clip the divided gradients to this norm.
        scaler: by which the losses were scaled; it is updated.

    Returns:
        The norm of the divided gradients before clipping, float32 of shape ().
    """
    squares, found = statistics
    scale = divisor if scaler is None else divisor * scaler.scale_on(divisor.device)
    norm = (squares.sqrt() / scale).float()
    optimizer.step_scaled(scale.float(), found, norm, max_norm)
    if scaler is not None:
        scaler.update(found)
    return norm
