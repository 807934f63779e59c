"""What goes on around the step: clipping, a loss scale, stepping on arrival, the average of the parameters."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import Tensor

from fasttrain.optim import clip, drive, ema, pinned
from fasttrain.optim.arrival import Arrival
from fasttrain.optim.groups import Groups
from fasttrain.optim.pinned import PinnedBytes
from fasttrain.optim.report import StepReport


class Around(Groups):
    """The pieces of a training recipe that belong to a step and are no part of its equation."""

    last_step: StepReport = StepReport()
    arriving: Arrival | None = None
    _coefficient: float = 1.0  # what the next step multiplies the gradients with, where the host knows it
    _swapped: bool = False  # the parameters are their EMA

    @property
    def _clip(self) -> float:
        """What the next step multiplies the gradients with, on the host: the coefficient of `clip_grad_norm_`."""
        if self._limit is None:
            return self._coefficient
        self._syncs += self._limit[0].device.type != "cpu"
        return clip.coefficient(self._limit[0].item(), self._limit[1])

    @_clip.setter
    def _clip(self, coefficient: float) -> None:
        self._coefficient, self._limit = coefficient, None

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False,
                        norm: Tensor | None = None) -> Tensor:
        """Scale the gradients of the next step so that their total norm is at most `max_norm`; none is rewritten.

        See `fasttrain.optim.clip_grad_norm`, which does the same for several optimizers together.

        Example:
            >>> import torch
            >>> from fasttrain.optim import SGD
            >>> weight = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = SGD([weight], lr=1.0)
            >>> weight.grad = torch.tensor([3.0, 4.0])
            >>> optimizer.clip_grad_norm_(1.0)
            tensor(5.)
            >>> optimizer.step()
            >>> weight.data
            tensor([0.4000, 0.2000])
        """
        return clip.clip_grad_norm([self], max_norm, norm_type, error_if_nonfinite, norm)

    def grad_statistics(self) -> tuple[Tensor, Tensor]:
        """Of all gradients: the sum of squares (float64), and whether any element is infinite or NaN; both of shape ().

        One pass over the gradients; of shards, the sum and the answer are those of the whole on every process.

        Raises:
            RuntimeError: parameters are stepped as their gradients arrive.
        """
        if self.arriving is not None:
            raise RuntimeError("parameters are stepped as their gradients arrive (step_on_arrival), before anything "
                               "can divide by a loss scale or skip: remove() that, or train without a scaler")
        return clip.statistics([self])

    def step_scaled(self, scale: Tensor, found: Tensor, norm: Tensor, max_norm: float | None = None) -> None:
        """Step with gradients divided by `scale`, clipped to `max_norm` by their `norm`; skip if `found`.

        What `fasttrain.LossScaler.step` calls; all three are tensors of one element.
        """
        if max_norm is not None:
            self._limit = norm, max_norm
        self.grad_scale, self.found_inf = scale, found
        try:
            self.step()
        finally:
            del self.grad_scale, self.found_inf

    def step_on_arrival(self, accumulation: int = 1) -> Arrival:
        """Step each parameter as soon as its gradient is complete, in backward, and free the gradient.

        Gradients then never exist all at once. `step` still ends a step: call it after the backward passes, as usual.
        A norm of all gradients is not known in time, so `clip_grad_norm_` raises; a gradient scaler cannot skip what
        has been stepped, so it does not go together with this either.

        Arguments:
            accumulation: backward passes of one step; a parameter is stepped at the last of them.

        Returns:
            What `remove()` ends it with.

        Raises:
            RuntimeError: it is on already.
            ValueError: `accumulation` is not positive.

        Example:
            >>> import torch
            >>> from fasttrain.optim import SGD
            >>> layer = torch.nn.Linear(2, 1)
            >>> optimizer = SGD(layer.parameters(), lr=0.1)
            >>> arrival = optimizer.step_on_arrival()
            >>> layer(torch.ones(1, 2)).sum().backward()
            >>> layer.weight.grad is None
            True
            >>> optimizer.step()
        """
        if self.arriving is not None:
            raise RuntimeError("parameters are stepped on arrival already: remove() that first")
        self.arriving = Arrival(self, accumulation)
        return self.arriving

    def pinned_bytes(self) -> PinnedBytes:
        """The pinned memory of the host that `offload=True` takes for these parameters; none is taken to answer.

        Example:
            >>> import torch
            >>> from fasttrain.optim import AdamW
            >>> optimizer = AdamW([torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))], master="split")
            >>> optimizer.pinned_bytes()
            PinnedBytes(parameters=8192, gradients=8192, states=40960, slots=1)
        """
        return pinned.needs(self, [(g, i) for g, group in enumerate(self.param_groups)
                                   for i in range(len(group["params"]))], self.offload_bucket)

    def ema_weights(self) -> AbstractContextManager[None]:
        """A context in which the parameters hold their EMA, for evaluation; afterwards they are as before.

        Raises:
            RuntimeError: no group has an `ema_decay`, or the block is inside another.

        Example:
            >>> import torch
            >>> from fasttrain.optim import SGD
            >>> weight = torch.nn.Parameter(torch.ones(1))
            >>> optimizer = SGD([weight], lr=1.0, ema_decay=0.5)
            >>> weight.grad = torch.ones(1)
            >>> optimizer.step()
            >>> with optimizer.ema_weights():
            ...     weight.item()
            0.5
            >>> weight.item()
            0.0
        """
        return ema.weights(self)

    def refresh(self) -> None:
        """Send every hyperparameter of every group to the device, for captured steps: a copy that nothing waits for.

        A replay of a CUDA graph runs no Python. `fasttrain.StepGraph` calls this before each replay, so that learning
        rates, weight decay and schedules take effect; whoever replays a graph of their own calls it themselves.

        Raises:
            RuntimeError: a CUDA graph is being captured, or the options of a group select another equation by now.
        """
        drive.refresh(self)

    def _scale(self, report: StepReport) -> float | None:
        """What the gradients are multiplied with; None if the step is to be skipped."""
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        for tensor in (found_inf, grad_scale):
            report.host_syncs += isinstance(tensor, Tensor) and tensor.device.type != "cpu"
        report.skipped = found_inf is not None and found_inf.item() != 0
        own = 1.0 if report.skipped else self._clip
        report.host_syncs, self._syncs = report.host_syncs + self._syncs, 0
        if report.skipped:
            return None
        return own if grad_scale is None else own / grad_scale.item()

    def _finish(self, report: StepReport) -> None:
        """What a step does after the kernels."""
        for index, group in enumerate(self.param_groups):
            if not report.skipped:
                if group.get("ema_decay") is not None:
                    ema.follow_resting(self, index)
                if "draws" in group:
                    group["draws"] += 1
            elif group.get("zero_gradients"):
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.detach().zero_()  # also of views: gradients in buckets
        self._close(report)

    def _close(self, report: StepReport) -> None:
        """Forget what was told for one step."""
        self._clip, self._syncs = 1.0, 0
        self._arrived.clear()
        report.close()
        self.last_step = report
