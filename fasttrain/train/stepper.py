"""One step of the optimizer over its micro-batches, however the model is divided; and what it came to, read late."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasttrain.dist.wire import Wire
from fasttrain.guards.bad_steps import MOST_NAMES, nonfinite
from fasttrain.guards.later import Arrived, Later
from fasttrain.optim.local import is_dtensor, local
from fasttrain.parallel import DataParallel, Zero
from fasttrain.parallel.accumulate import Accumulation
from fasttrain.parallel.pipeline import Pipeline
from fasttrain.parallel.sharded import Sharded
from fasttrain.precision.loss_scale import LossScaler, step_divided
from fasttrain.train import fitting
from fasttrain.train.clock import PhaseClock
from fasttrain.train.traffic import Traffic

Loss = Callable[[Any, Any], Any]


class Numbers(NamedTuple):
    """What a step has come to: the same on every rank.

    Attributes:
        step: counted from 1.
        loss: the mean over ranks and micro-batches, or over all items.
        norm: of the mean gradient, before it was clipped.
        skipped: the gradient, or the loss, was not finite, and no parameter was changed.
        stop: how many ranks wish to stop.
        scale: the loss scale of the step; 1.0 without a scaler.
        names: of the parameters whose gradients are not finite, where a step was skipped on the CPU.
    """

    step: int
    loss: float
    norm: float
    skipped: bool
    stop: int
    scale: float = 1.0
    names: tuple[str, ...] = ()


class Stepper:
    """Runs backward passes, clips, steps and forgets the gradients; a step with one that is not finite is skipped.

    With optimizers of this package nothing waits for the device: scale, norm and the decision to skip stay there.
    torch's optimizers have the decision taken by the host, which waits for a GPU.

    Arguments:
        model: a module, a `DataParallel`, or what `fasttrain.parallel.shard` returned.
        optimizer: of its parameters; of this package, a `Zero`, or torch's.
        loss: from (model, micro-batch) to the mean loss, a tensor of shape (); or to (sum of losses, number of items),
            and the gradient is the mean over the items of all micro-batches and ranks. With a pipeline, from a batch to
            (inputs, targets).
        clip: largest norm of the gradient; 0 does not clip.
        context: makes the context in which `loss` runs (autocast).
        scaler: scales losses; needs an optimizer of this package.
        pipeline: a `fasttrain.parallel.pipeline.Pipeline` of the model, which has the loss and cuts the batch; it gets
            `context` and `scaler`.
        clock: what measures the phases "forward_backward", "communication" (what backward did not hide) and
            "optimizer".

    Attributes:
        steps: that were made.
        stepping: parameters are being changed: an exception that comes now leaves them half-way.
        traffic: what they have sent, and waited for; None in one process alone.
        stop: this rank wishes to stop: the others learn of it with the next step.

    Raises:
        TypeError: a scaler, or a loss with items, with an optimizer of torch; `clip` with one of parameters of which
            some are cut over ranks; a pipeline of a model that is neither a `DataParallel` nor sharded, none of one
            that was split, or a `loss` that does not return (inputs, targets) for it.

    Example:
        >>> from fasttrain.optim import AdamW
        >>> model = nn.Linear(2, 1)
        >>> stepper = Stepper(model, AdamW(model.parameters()), lambda model, x: model(x).square().mean(), clip=1.0)
        >>> stepper.run([torch.ones(4, 2), torch.zeros(4, 2)])      # a step of two micro-batches
        >>> [numbers.step for numbers in stepper.arrived()]
        [1]
    """

    def __init__(self, model: nn.Module | Sharded, optimizer: Any, loss: Loss, *, clip: float = 0.0,
                 context: Callable[[], AbstractContextManager[Any]] = nullcontext, scaler: LossScaler | None = None,
                 pipeline: Pipeline | None = None, clock: PhaseClock | None = None):
        self.model: Any = model.module if isinstance(model, Sharded) else model
        self.bare: nn.Module = model.module if isinstance(model, (DataParallel, Sharded)) else model
        self.optimizer, self.loss, self.clip, self.context, self.scaler = optimizer, loss, clip, context, scaler
        self.sharded = model if isinstance(model, Sharded) else None
        self.reducer = model.reducer if isinstance(model, DataParallel) else None
        self.wire: Wire | None = None  # to all ranks
        if self.sharded is not None:
            self.wire = self.sharded.everyone
        elif self.reducer is not None:
            mesh = self.reducer.reach.mesh
            self.wire = self.reducer.wire if mesh is None else mesh.wire()
        self.device = next(self.model.parameters()).device
        self.ours = hasattr(optimizer, "step_scaled") and getattr(optimizer, "_pattern", True) is not None
        fitting.check_optimizer(optimizer, self.ours, self.bare, clip, scaler is not None)
        fitting.check_pipeline(pipeline, model, self.bare, self.wire)
        self.pipeline = pipeline
        if pipeline is not None:
            pipeline.context, pipeline.scaler = context, scaler
        self.steps = 0
        self.stop = False
        self.clock = clock or PhaseClock(self.device)
        self.traffic = Traffic(self._wires()) if self.wire is not None else None
        self.stepping = False
        self._scale: float | None = None if scaler is None else scaler.get_scale()
        self._later = Later(delay=int(self.device.type == "cuda"))
        self._arrived: list[Arrived] = []
        self._one = torch.ones((), dtype=torch.float64, device=self.device)

    def _wires(self) -> list[Wire]:
        """Those that a step uses."""
        found = list(self.reducer.reach.everyone) if self.reducer is not None else []
        if self.sharded is not None:
            found += [self.sharded.wire, self.sharded.everyone]
        if self.pipeline is not None:
            found.append(self.pipeline.wire)
        if isinstance(self.optimizer, Zero):
            found += [one.wire for one in self.optimizer.method.divided.values()]
        return list({id(wire): wire for wire in found}.values())

    def run(self, micro_batches: Sequence[Any]) -> None:
        """One step. Every rank gives as many micro-batches, of its own part of the data; a pipeline takes one batch."""
        if self.traffic is not None:
            self.traffic.begin()
        with self.clock("forward_backward"):
            total, items = self._accumulated(micro_batches) if self.pipeline is None else self._piped(*micro_batches)
        self._waited("forward_backward")
        with self.clock("optimizer"):
            self._finish(total, items)
        self._waited("optimizer")
        if self.traffic is not None:
            self.traffic.end()

    def _accumulated(self, micro_batches: Sequence[Any]) -> tuple[Tensor, int | None]:
        """The sum of the losses whose backward passes were made, and of their items; None: they are means."""
        accumulate = Accumulation(self.sharded or self.reducer or _Alone(), len(micro_batches))
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        items: int | None = None  # losses are means; 0 are sums without an item on this rank
        for micro_batch in micro_batches:
            with accumulate():
                with self.context():
                    result = self.loss(self.model, micro_batch)
                if isinstance(result, tuple):
                    loss, count = result
                    items = (items or 0) + self._count(count)
                else:
                    loss = result / len(micro_batches)
                total += loss.detach()
                if self.reducer is not None:
                    self.reducer.loss, self.reducer.stop = total, self.stop
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return total, items

    def _piped(self, batch: Any) -> tuple[Tensor, int | None]:
        """The same, of a batch that a pipeline has worked through."""
        assert self.pipeline is not None
        if self.reducer is not None:
            self.reducer.stop = self.stop
        self.pipeline.step(*fitting.taken_apart(self.loss, self.model, batch))
        assert self.pipeline.sums is not None
        return self.pipeline.sums.loss.clone(), self.pipeline.sums.items

    def _waited(self, phase: str) -> None:
        """Count what a phase has waited for other ranks as communication."""
        if self.traffic is not None:
            self.clock.move(phase, "communication", self.traffic.waited())

    def _count(self, items: int) -> int:
        if not self.ours:
            raise TypeError(f"the loss comes with a number of items, by which a {type(self.optimizer).__name__} cannot "
                            "divide late: take an optimizer of fasttrain.optim, or return the mean")
        owner = self.sharded or self.reducer
        if owner is not None:
            owner.count(items)
        return items

    def _finish(self, loss: Tensor, items: int | None) -> None:
        loss, stop = self._over_ranks(loss, items)
        scale = None if self.scaler is None else self.scaler.scale_on(self.device).clone()
        self.stepping = True
        norm, bad = self._step(loss, items) if self.ours else self._step_of_torch(loss)
        self.steps += 1
        self.stepping = False
        if self.scaler is not None and self.device.type == "cpu":
            self._rescale(self.scaler.get_scale())
        looks = self.device.type == "cpu" and not isinstance(self.optimizer, Zero)  # whose gradients are in shards
        names = self._nonfinite() if looks and bad else ()
        self.optimizer.zero_grad()
        arrived = self._later.put(self.steps, tuple(names)[:MOST_NAMES], loss=loss, norm=norm, bad=bad, stop=stop,
                                  scale=scale)
        self._arrived += [arrived] if arrived else []

    def _nonfinite(self) -> list[str]:
        """The names of parameters whose gradients are not finite on any rank: each may have a part of the model."""
        here = nonfinite(self.bare.named_parameters())
        if self.wire is None:
            return here
        told = self.wire.gather_objects_json(json.dumps(here))
        return list(dict.fromkeys(name for names in told for name in json.loads(names)))

    def _step(self, loss: Tensor, items: int | None) -> tuple[Tensor, Tensor]:
        """With an optimizer of this package: its norm, and whether it was skipped."""
        owner = self.sharded or self.reducer
        if self.reducer is None or isinstance(self.optimizer, Zero):
            statistics = self.optimizer.grad_statistics()
        else:
            statistics = self.reducer.statistics()
        most = self.clip or None
        unusable = ~torch.isfinite(loss)
        statistics = statistics[0], statistics[1] | unusable
        if items is None:
            norm = step_divided(self._one, statistics, self.optimizer, most, self.scaler)
        elif owner is not None:
            norm = owner.step(self.optimizer, most, self.scaler, unusable)
        else:
            norm = step_divided(self._one * items, statistics, self.optimizer, most, self.scaler)
        return norm, statistics[1]

    def _step_of_torch(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """With an optimizer of torch: the host looks at norm and loss, and does not step if one is not finite."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        if isinstance(self.optimizer, Zero):
            norm = self.optimizer.grad_statistics()[0].sqrt().float()
        elif self.reducer is not None:
            norm = self.reducer.grad_norm()
        elif self.sharded is not None:  # torch's would be that of a stage, and fails where meshes differ
            norm = self.sharded.statistics(self.optimizer)[0].sqrt().float()
        else:
            norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        bad = ~torch.isfinite(norm) | ~torch.isfinite(loss)
        if not bad:
            if self.clip and isinstance(self.optimizer, Zero):
                self.optimizer.clip_grad_norm_(self.clip)
            elif self.clip:
                _clip(params, self.clip, norm)
            self.optimizer.step()
        return norm, bad

    def _over_ranks(self, loss: Tensor, items: int | None) -> tuple[Tensor, Tensor]:
        """The mean loss and the wishes to stop, over all ranks; of the reducer's they came with the gradients."""
        if self.sharded is not None:
            return self.sharded.losses(loss, self.stop, items)
        if self.reducer is not None and not self.reducer.idle:
            sums = self.reducer.sums
            assert sums is not None
            return sums.loss / (self.reducer.reach.terms if items is None else sums.tokens), sums.stop
        return loss / (1 if items is None else items), self._one * self.stop

    def state_dict(self) -> dict[str, int]:
        """How many steps were made."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after so many steps."""
        self.steps = state["steps"]

    def _rescale(self, scale: float) -> None:
        """What a wire's codes have lacked is scaled as the losses are. On a GPU it follows them some steps late."""
        if self.reducer is not None and not self.reducer.idle and self._scale not in (None, scale):
            self.reducer.method.rescale(scale / self._scale)
        self._scale = scale

    def arrived(self, all_of_them: bool = False) -> list[Numbers]:
        """The numbers of steps that have not been asked for yet.

        On a GPU those of the newest step stay out, so that nobody waits for the device; `all_of_them` waits.
        """
        taken, self._arrived = self._arrived, []
        if all_of_them:
            taken += self._later.flush()
        if self.scaler is not None and self.device.type == "cuda":
            for one in taken:
                self._rescale(one.values["scale"])
        return [Numbers(one.step, one.values["loss"], one.values["norm"], bool(one.values["bad"]),
                        int(one.values["stop"]), one.values["scale"] or 1.0, one.note) for one in taken]


def _clip(params: Sequence[Tensor], most: float, norm: Tensor) -> None:
    """torch's `clip_grads_with_norm_`, which refuses DTensors of several meshes."""
    if not any(is_dtensor(p.grad) for p in params):
        nn.utils.clip_grads_with_norm_(params, most, norm)
        return
    coefficient = (most / (norm + 1e-6)).clamp(max=1.0)
    for grad in (local(p.grad) for p in params if p.grad is not None):
        grad.mul_(coefficient.to(grad.device))


class _Alone:
    """In the place of a reducer where there is one process."""

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()
