"""Losses and gradients that are not finite: skipped by the device, counted, named, and ended when they do not end."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasttrain.guards.judged import MOST_NAMES, Judged, TooManyBadSteps
from fasttrain.guards.later import Arrived, Later
from fasttrain.optim import clip
from fasttrain.precision.loss_scale import LossScaler

KEPT = 100  # bad steps that are remembered


def nonfinite(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of those whose gradients are not finite now. Waits for the device."""
    return [name for name, p in named if p.grad is not None and not torch.isfinite(_values(p.grad)).all()]


def _values(grad: Tensor) -> Tensor:
    grad = grad.to_local() if hasattr(grad, "to_local") else grad
    return grad.coalesce().values() if grad.is_sparse else grad


class NonFinite:
    """Skips steps with a loss or gradients that are not finite, and gives up after `most` of them in a row.

    `step` makes the step of the optimizer, or has the device skip it: nothing is read on the host on the way, except
    for torch's optimizers, which cannot skip by themselves. What became of a step is told in the next call, with the
    parameters whose gradients were not finite: the pass that measures the norm leaves a sum for each, which stays on
    the device and is read of bad steps only. Where `statistics` are given there are no such sums: then the gradients
    are looked at in the bad step itself on the CPU, on a GPU in the steps that follow one, until one is good.

    Arguments:
        named: `model.named_parameters()`, or the module, to name them.
        most: bad steps in a row that end the run. Where a loss scale backs off, overflows count only at a scale of 1 or
            less.
        culprits: where other processes' gradients are in the sum: what tells by rank who it was, as
            ``lambda: reducer.culprits`` of a `fasttrain.parallel.Reducer`.
        delay: in steps, as in `Later`.

    Raises:
        ValueError: `most` is not positive.

    Example:
        >>> from fasttrain.optim import AdamW
        >>> model = nn.Linear(2, 1)
        >>> optimizer, guard = AdamW(model.parameters()), NonFinite(model, most=3)
        >>> for step, x in enumerate((1.0, float("inf"), 1.0)):
        ...     optimizer.zero_grad()
        ...     loss = model(torch.full((4, 2), x)).square().mean()
        ...     loss.backward()
        ...     judged = guard.step(optimizer, step, loss=loss, batch=f"window {step}", max_norm=1.0)
        >>> judged.step, judged.batch, judged.kind, judged.names
        (1, 'window 1', 'bad', ('weight', 'bias'))
        >>> guard.flush()[-1].skipped
        1
    """

    def __init__(self, named: nn.Module | Iterable[tuple[str, Tensor]] = (), most: int = 10, *,
                 culprits: Callable[[], Mapping[int, Iterable[str]]] | None = None, delay: int = 1):
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise ValueError(f"most={most!r} must be a whole number of at least 1")
        self._named = list(named.named_parameters() if isinstance(named, nn.Module) else named)
        self._names = {id(p): name for name, p in self._named}
        self.most, self.culprits, self.later = most, culprits, Later(delay)
        self.skipped, self.overflows, self.last_good = 0, 0, None
        self._row: list[dict[str, Any]] = []
        self.bad: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._looking = False
        self._fixed = LossScaler(1.0, dynamic=False)

    last_good: int | None

    @property
    def in_a_row(self) -> int:
        """Bad steps since the last good one."""
        return len(self._row)

    # --- On the device ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, optimizer: Any, step: int, *, loss: Tensor | None = None, batch: Any = None,
             max_norm: float | None = None, scaler: LossScaler | None = None,
             statistics: tuple[Tensor, Tensor] | None = None) -> Judged | None:
        """Step the optimizer, unless the loss or a gradient is not finite.

        Arguments:
            optimizer: one, or several that are stepped or skipped together.
            step: its number.
            loss: of this step, not scaled; the same on every process, as a sum or mean of theirs is, or None.
            batch: what names the batch in a report: a JSON value.
            max_norm: clip the gradients to this norm.
            scaler: whose scale the loss was multiplied with.
            statistics: of the gradients, as to `LossScaler.step`, where they are known.

        Returns:
            What became of the step before this one; None at the first.

        Raises:
            TooManyBadSteps: it was the last that is allowed. This step has been made or skipped like any other.
            TypeError: a scaler with an optimizer of torch.
            RuntimeError: parameters are stepped as their gradients arrive, before anything can be skipped.
        """
        together = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        if any(getattr(one, "arriving", None) is not None for one in together):
            raise RuntimeError("parameters are stepped as their gradients arrive (step_on_arrival), before anything "
                               "can be skipped: remove() that, or watch() the losses only")
        sums: list[tuple[list[Tensor], Tensor]] = []
        squares, found = clip.statistics(together, sums) if statistics is None else statistics
        if loss is not None:
            here = loss.detach().to(found.device)
            found = found | (here - here != 0)  # not finite; isfinite would be four kernels
        hidden = any(clip.in_shards(one) for one in together)  # then no parameter has a gradient of its own
        names, flags = ([], None) if sums or hidden else self._look(found)
        scale = None if scaler is None else scaler.scale_on_device
        if all(_skips(one) for one in together):
            norm = (self._fixed if scaler is None else scaler).step(together, max_norm, (squares, found))
        elif scaler is not None:
            raise TypeError("a LossScaler steps optimizers of fasttrain only: use torch.amp.GradScaler with torch's, "
                            "which skips by itself, and tell this guard by watch()")
        else:
            norm = squares.sqrt().float()
            if not found.item():
                _step_of_torch(together, max_norm, norm)
        return self.watch(step, found=found, loss=loss, norm=norm, batch=batch, scale=scale, names=names, flags=flags,
                          sums=sums)

    def watch(self, step: int, *, found: Tensor | bool, loss: Tensor | float | None = None,
              norm: Tensor | float | None = None, batch: Any = None, scale: Tensor | float | None = None,
              names: Iterable[str] = (), flags: Tensor | None = None,
              sums: Sequence[tuple[Sequence[Tensor], Tensor]] = ()) -> Judged | None:
        """Tell of a step that was made or skipped elsewhere; else as `step`.

        Arguments:
            found: something was not finite, and the step was skipped.
            scale: the loss scale of the step, if it backs off by itself.
            names: of the parameters, where they are known already.
            flags: for each parameter of `named`, whether its gradient is not finite, to be read with the rest.
            sums: parameters, and one sum of each one's gradient, which is read only if the step was bad.
        """
        arrived = self.later.put(step, (batch, tuple(names), sums), found=found, loss=loss, norm=norm, scale=scale,
                                 flags=flags)
        return None if arrived is None else self._judge(arrived)

    def _look(self, found: Tensor) -> tuple[list[str], Tensor | None]:
        """Whose gradients are not finite: at once on the CPU, where reading costs nothing; else as flags, if asked."""
        if found.device.type == "cpu":
            return (nonfinite(self._named)[:MOST_NAMES] if found.item() else []), None
        if not self._looking or not self._named:
            return [], None
        return [], torch.stack([torch.zeros((), dtype=torch.bool, device=found.device) if p.grad is None
                                else ~torch.isfinite(_values(p.grad)).all().to(found.device) for _, p in self._named])

    # --- On the host --------------------------------------------------------------------------------------------------

    def update(self, step: int, found: bool, loss: float | None = None, *, norm: float | None = None, batch: Any = None,
               scale: float | None = None, names: Iterable[str] = ()) -> Judged:
        """Take what became of a step, in numbers of the host.

        Raises:
            TooManyBadSteps: it was the last that is allowed.
        """
        return self._checked(self._count(step, found, loss, norm, batch, scale, tuple(names)))

    def flush(self) -> list[Judged]:
        """What became of the steps that were not told yet; waits for the device. At the end, and before saving.

        Raises:
            TooManyBadSteps: as `step`.
        """
        return [self._judge(arrived) for arrived in self.later.flush()]

    def _judge(self, arrived: Arrived) -> Judged:
        return self._checked(self._counted(arrived))

    def _checked(self, judged: Judged) -> Judged:
        if judged.kind == "bad" and judged.in_a_row >= self.most:
            raise TooManyBadSteps(self._row, self.last_good)
        return judged

    def _counted(self, arrived: Arrived) -> Judged:
        values, (batch, names, sums) = arrived.values, arrived.note
        if values["flags"] is not None:
            flags = values["flags"] if isinstance(values["flags"], list) else [values["flags"]]
            names = tuple(name for (name, _), flag in zip(self._named, flags, strict=True) if flag)[:MOST_NAMES]
        elif values["found"] and not names:
            names = tuple(self._names.get(id(p), f"a parameter of shape {tuple(p.shape)}")
                          for params, made in sums for p, number in zip(params, made.tolist(), strict=True)
                          if not math.isfinite(number))[:MOST_NAMES]
        return self._count(arrived.step, bool(values["found"]), values["loss"], values["norm"], batch, values["scale"],
                           names)

    def _count(self, step: int, found: bool, loss: float | None, norm: float | None, batch: Any, scale: float | None,
               names: tuple[str, ...]) -> Judged:
        finite = loss is None or math.isfinite(loss)
        if not found and finite:
            self._row, self._looking, self.last_good = [], False, step
            return Judged(step, batch, loss, norm, "good", (), 0, self.skipped)
        self.skipped += 1
        if finite and scale is not None and scale > 1.0:
            self.overflows += 1
            return Judged(step, batch, loss, norm, "overflow", names, len(self._row), self.skipped)
        if self.culprits is not None and self._row:  # they are known from the second bad step in a row on
            names += tuple(f"{name} (rank {rank})" for rank, those in self.culprits().items() for name in those)
        told = {"step": step, "batch": batch, "loss": _told(loss), "norm": _told(norm), "parameters": list(names)}
        self._row = [*self._row, told]
        self.bad.append(told)
        self._looking = True
        return Judged(step, batch, loss, norm, "bad", names, len(self._row), self.skipped)

    def state_dict(self) -> dict[str, Any]:
        """JSON values. Steps that were not told yet are counted first, which waits for the device.

        Were they the last bad ones that are allowed, the next bad step raises.
        """
        for arrived in self.later.flush():
            self._counted(arrived)
        return {"skipped": self.skipped, "overflows": self.overflows, "last_good": self.last_good, "row": self._row,
                "bad": list(self.bad)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ValueError: it is the state of something else; nothing was changed.
        """
        names = ("skipped", "overflows", "last_good", "row", "bad")
        if missing := [name for name in names if name not in state]:
            raise ValueError(f"the state has no {', '.join(missing)}: it is not one of a NonFinite guard")
        self.later = Later(self.later.delay)
        self.skipped, self.overflows, self.last_good = state["skipped"], state["overflows"], state["last_good"]
        self._row, self.bad = list(state["row"]), deque(state["bad"], maxlen=KEPT)
        self._looking = bool(self._row)


def _told(number: float | None) -> float | str | None:
    """JSON has no NaN."""
    return number if number is None or math.isfinite(number) else str(number)


def _skips(optimizer: Any) -> bool:
    """Whether the device can skip a step of it: those of this package, and Zero around one."""
    return hasattr(optimizer, "step_scaled") and getattr(optimizer, "_pattern", True) is not None


def _step_of_torch(optimizers: list[Any], max_norm: float | None, norm: Tensor) -> None:
    for optimizer in optimizers:
        if max_norm is not None:
            if hasattr(optimizer, "clip_grad_norm_"):
                optimizer.clip_grad_norm_(max_norm, norm=norm)
            else:
                params = [p for group in optimizer.param_groups for p in group["params"]]
                nn.utils.clip_grads_with_norm_(params, max_norm, norm)
        optimizer.step()
