"""Training steps through a model that was split into stages, by the schedules of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasttrain.dist.mesh import Mesh
from fasttrain.dist.wire import Wire
from fasttrain.parallel.data import DataParallel
from fasttrain.parallel.dropout import Draws
from fasttrain.parallel.pipeline import batches, boundaries, held, schedules
from fasttrain.parallel.pipeline.clock import Action
from fasttrain.parallel.pipeline.copies import Copies
from fasttrain.parallel.pipeline.forward import forward
from fasttrain.parallel.pipeline.gradients import Ready, owner_of
from fasttrain.parallel.pipeline.parts import parted
from fasttrain.parallel.pipeline.vigil import Vigil
from fasttrain.parallel.reducer import Reducer
from fasttrain.parallel.sharded import Sharded
from fasttrain.precision.loss_scale import LossScaler, step_divided

KEPT = 4  # schedules, for so many shapes of batches

Loss = Callable[[Any, Any], "Tensor | tuple[Tensor, int]"]
Metric = Callable[[Any, Any], Tensor]


class Sums(NamedTuple):
    """What a step has added up over its micro-batches, the same on every rank of the pipeline.

    Attributes:
        loss: the mean of the losses, or the sum where they come with items; float64 of shape ().
        items: how many, over all micro-batches; None: the losses are means.
        metrics: by name, each the sum over micro-batches, float64 of shape ().
    """

    loss: Tensor
    items: int | None
    metrics: dict[str, Tensor]


class Pipeline:
    """Runs batches through a model that `split` has cut, and leaves the gradient of the mean loss.

    A batch is cut into micro-batches, which are what a step accumulates. Every rank of the pipeline calls the same
    methods with the same batch, of which the first stage takes the inputs and the last the targets. After `step`
    gradients are reduced, once, over whatever the model is divided or copied; step the optimizer with `update`, or as
    without a pipeline.

    Arguments:
        model: what `split` returned, or a `DataParallel` or what `shard` returned of that.
        mesh: by which it was split.
        loss: from (output of the last stage, targets of the micro-batch) to the mean loss, a tensor of shape (); or to
            (sum of losses, number of items). It runs on the last stage only.
        schedule: one of `fasttrain.parallel.pipeline.schedules.KINDS`; None: that for which the model was split.
        micro_batches: of a step.
        context: makes the context in which stages and loss run (autocast).
        scaler: scales losses.
        metrics: by name, from (output, targets) to a tensor of shape (), to be added up over micro-batches.
        draws: what `fasttrain.parallel.seed_dropout` returned, called before `split`. Say ``draws.at(step, sample)``
            before each step; it is told which micro-batch is under way.

    Attributes:
        sums: of the last step or evaluation; see `Sums`.
        actions: what the stages of this rank did in the last step, in their order; see `clock.Action`.
        wire: of the pipeline: its `calls` and `bytes` count "activations" and "gradients" that this rank sent.

    Raises:
        TypeError: the model was not split.
        ValueError: the schedule cannot have so many micro-batches, or the model was split for another placement.

    Example:
        >>> stage = split(model, mesh, schedule="interleaved")                            # doctest: +SKIP
        >>> pipeline = Pipeline(stage, mesh, F.cross_entropy, micro_batches=8)            # doctest: +SKIP
        >>> loss = pipeline.step(inputs, targets)                                         # doctest: +SKIP
        >>> norm = pipeline.update(optimizer, max_norm=1.0)                               # doctest: +SKIP
    """

    def __init__(self, model: Any, mesh: Mesh, loss: Loss, schedule: str | None = None, micro_batches: int = 1, *,
                 context: Callable[[], AbstractContextManager[Any]] = nullcontext, scaler: LossScaler | None = None,
                 metrics: Mapping[str, Metric] | None = None, draws: Draws | None = None):
        self.model: nn.Module = model.module if isinstance(model, (DataParallel, Sharded)) else model
        self.held = held.of(self.model)
        self.mesh, self.loss, self.micro_batches = mesh, loss, micro_batches
        self.schedule = (schedule or self.held.schedule).lower()
        self._check()
        self.context, self.scaler, self.metrics, self.draws = context, scaler, dict(metrics or {}), draws
        self.wire = Wire(mesh.device, mesh.timeout_s, mesh.ranks("pipeline"), mesh.wire().watch)
        self.copies = Copies(self.model, self.held, mesh)
        self.owner: Any = owner_of(model, mesh, self.copies)
        self.copies.make_equal()
        self._ready = Ready(self.model, self.held)
        self.actions: list[Action] = []
        self.sums: Sums | None = None
        self._vigil = Vigil(self.wire, self.actions)
        self._built: dict[Any, Any] = {}
        self._boundaries: dict[Any, list[boundaries.Boundary]] = {}
        self._counts: bool | None = None  # losses come with items: known after the first step
        self._inputs: list[Any] = []
        self._targets: list[Any] = []

    def _check(self) -> None:
        kind, placement = schedules.kind(self.schedule), self.held.placement
        if kind.shape != placement.shape or (kind.exactly and kind.each != placement.each):
            raise ValueError(f"the schedule {self.schedule!r} has {kind.each} stages on each rank, in a {kind.shape}, "
                             f"and the model was split for {self.held.schedule!r}, with {placement.each} in a "
                             f"{placement.shape}: give schedule to split()")
        if placement.ranks != self.mesh.sizes["pipeline"]:
            raise ValueError(f"the model was split over {placement.ranks} ranks, and the mesh has "
                             f"{self.mesh.sizes['pipeline']} along pipeline: take the mesh that split() had")
        schedules.check_micro_batches(self.schedule, placement, self.micro_batches)
        if kind.split:
            schedules.check_split(self.model)

    # --- What users call ----------------------------------------------------------------------------------------------

    def step(self, inputs: Any, targets: Any = None) -> Tensor:
        """Forward and backward passes of a batch; gradients are reduced when it returns.

        Arguments:
            inputs, targets: tensors, or nested lists, tuples and mappings of them, cut along the first dimension; the
                same on every rank of the pipeline.

        Returns:
            The mean loss of this pipeline's batch, float64 of shape (), the same on all its ranks; see `sums`.

        Raises:
            ValueError: the batch does not divide into micro-batches; nothing has been done.
            PeerFailed: another rank has failed.
        """
        self._take(inputs, targets)
        numbers = torch.arange(self.micro_batches)
        try:
            schedule = self._schedule()
            self._begin()
            self._ready.begin()
            with self._vigil, self.owner.paused():
                schedule.step(*([numbers] if 0 in self.held.mine else []),
                              **({"target": numbers} if self.held.is_last else {}))
            self._share()
            self._finish()
        finally:
            self._inputs, self._targets = [], []
        return self._mean()

    @torch.no_grad()
    def evaluate(self, inputs: Any, targets: Any = None) -> Tensor:
        """The mean loss of a batch, as of `step`, without gradients; the model stays in the mode that it is in."""
        self._take(inputs, targets)
        try:
            between = self._between()
            self._begin()
            with self._vigil:
                forward(self.wire, self.held, self.micro_batches, between, self._run, self.actions)
            self._share()
        finally:
            self._inputs, self._targets = [], []
        return self._mean()

    def statistics(self, optimizer: Any) -> tuple[Tensor, Tensor]:
        """The sum of squares of all gradients of the whole model, float64, and whether any is not finite, of shape ().

        The same on every rank; each parameter counts once. `optimizer` is that of this rank's parameters.
        """
        if isinstance(self.owner, Reducer):
            return self.owner.statistics()
        return self.owner.statistics(optimizer)

    def update(self, optimizer: Any, max_norm: float | None = None, unusable: Tensor | None = None) -> Tensor:
        """Step an optimizer of this package: divided by items if the losses came with them, unscaled, clipped.

        Where something is not finite every rank skips the step. Call ``optimizer.zero_grad()`` afterwards.

        Arguments:
            optimizer: of this rank's parameters.
            max_norm: clip the norm of the whole model's gradient to this.
            unusable: bool of shape (), the same on every rank: something else is not finite.

        Returns:
            The norm before clipping, float32 of shape (), the same on every rank.

        Raises:
            RuntimeError: there was no step.
        """
        if self.sums is None:
            raise RuntimeError("there are no gradients: call step() first")
        if self.sums.items is not None:
            return self.owner.step(optimizer, max_norm, self.scaler, unusable)
        squares, found = self.statistics(optimizer)
        found = found if unusable is None else found | unusable
        one = torch.ones((), dtype=torch.float64, device=squares.device)
        return step_divided(one, (squares, found), optimizer, max_norm, self.scaler)

    def close(self) -> None:
        """End its thread and forget schedules; nothing may be under way. Process groups stay."""
        self._vigil.close()
        self._built.clear()

    # --- One step -----------------------------------------------------------------------------------------------------

    def _take(self, inputs: Any, targets: Any) -> None:
        self._inputs = batches.divided(inputs, self.micro_batches, "inputs")
        self._targets = batches.divided(targets, self.micro_batches, "targets")

    def _begin(self) -> None:
        self.actions.clear()
        self._totals = torch.zeros(2 + len(self.metrics), dtype=torch.float64, device=self.wire.device)
        self._items: int | None = None

    def _run(self, stage: int, number: int, given: Any) -> Any:
        """Run a stage of this rank on a micro-batch; the last one gives the loss that is to be differentiated."""
        if self.draws is not None:
            self.draws.micro_batch(number, batches.samples(self._inputs[number]))
        with self.context():
            x = self._inputs[number] if stage == 0 else given
            y = parted(self.model).run(self.held.stages[stage], x)
            return self._loss(number, y) if stage == self.held.placement.stages - 1 else y

    def _loss(self, number: int, output: Any) -> Tensor:
        targets = self._targets[number]
        result = self.loss(output, targets)
        if isinstance(result, tuple):
            loss, items = result
            self._items = (self._items or 0) + int(items)
        else:
            loss = result / self.micro_batches
        self._totals[0] += loss.detach()
        with torch.no_grad():
            for place, metric in enumerate(self.metrics.values(), 2):
                self._totals[place] += metric(output, targets)
        if self.scaler is not None and torch.is_grad_enabled():
            loss = self.scaler.scale(loss)
        return loss.reshape(1)

    def _share(self) -> None:
        """Make known what the last stage has added up."""
        if self._items is not None:
            self._totals[1] = self._items
        totals = self.wire.sum_(self._totals)
        if self._counts is None:
            has = self._items is not None if self.held.is_last else False
            self._counts = bool(self.wire.sum_(torch.tensor([float(has)], device=self.wire.device)).item())
        items = int(totals[1].item()) if self._counts else None
        self.sums = Sums(totals[0], items, dict(zip(self.metrics, totals[2:], strict=True)))

    def _mean(self) -> Tensor:
        assert self.sums is not None
        return self.sums.loss if self.sums.items is None else self.sums.loss / self.sums.items

    # --- Schedules ----------------------------------------------------------------------------------------------------

    def _between(self) -> list[boundaries.Boundary]:
        """What goes from stage to stage for batches like this."""
        key = batches.shape_of(self._inputs[0], self.wire.device)
        if key not in self._boundaries:
            self._boundaries[key] = boundaries.found(
                self.wire, self.held, self.model, lambda stage, given: self._run(stage, 0, given),
                schedules.kind(self.schedule).split)
        return self._boundaries[key]

    def _schedule(self) -> Any:
        """torch's schedule for batches like this."""
        key = batches.shape_of(self._inputs[0], self.wire.device)
        if key in self._built:
            return self._built[key]
        from fasttrain.parallel.pipeline.stage import stages_of

        stages = stages_of(self.model, self.held, self._between(), self._run, self.wire, self.actions)
        schedule = schedules.make(self.schedule, stages, self.micro_batches, lambda loss, number: loss, self._reduce)
        while len(self._built) >= KEPT:
            del self._built[next(iter(self._built))]
        self._built[key] = schedule
        return schedule

    # --- Gradients ----------------------------------------------------------------------------------------------------

    def _reduce(self, stage: int) -> None:
        """All gradients of a stage are there, while other stages of the pipeline still work."""
        self.actions.append(Action("R", stage, -1))
        if params := self._ready.over(stage):
            self.owner.reduce(params)

    def _finish(self) -> None:
        """What has not been reduced within the schedule is now."""
        assert self.sums is not None
        if hasattr(self.owner, "loss"):
            self.owner.loss = self.sums.loss
        if self.sums.items is not None:
            self.owner.count(self.sums.items)
        self.owner.reduce()
        self.owner.finish()
