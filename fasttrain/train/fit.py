"""The training loop, to be read in one sitting. It uses only parts that work alone in somebody else's loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fasttrain.checkpoint.checkpointer import Checkpointer
from fasttrain.checkpoint.loading import Loaded
from fasttrain.checkpoint.rng import Rng
from fasttrain.checkpoint.stopping import Stopping
from fasttrain.guards.bad_steps import NonFinite
from fasttrain.guards.spikes import LossSpikes, SpikeDecision
from fasttrain.guards.stopping import EarlyStopping, Gap
from fasttrain.parallel.pipeline import Pipeline
from fasttrain.precision.mixed import Precision
from fasttrain.train.batches import split
from fasttrain.train.clock import PhaseClock
from fasttrain.train.config import ASKED
from fasttrain.train.keeper import Keeper
from fasttrain.train.measured import check_evaluations, check_whole, measured
from fasttrain.train.meter import Meter
from fasttrain.train.stepper import Loss, Numbers, Stepper
from fasttrain.train.traffic import Traffic
from fasttrain.train.usage import Tidy

Record = dict[str, Any]


class Fitted(NamedTuple):
    """How a run ended.

    Attributes:
        step: steps made, over all parts of a run that was resumed.
        reason: "done", what a guard said, or `ASKED`.
        metrics: of the last evaluation.
        traffic: what the steps have sent; None in one process alone.
    """

    step: int
    reason: str
    metrics: Record
    traffic: Traffic | None


def fit(model: Any, data: Any, optimizer: Any, loss: Loss, *, steps: int, **options: Any) -> Fitted:
    """Train a model: see `Loop`, whose arguments these are.

    Example:
        >>> from fasttrain.optim import AdamW
        >>> model = torch.nn.Linear(1, 1)
        >>> batches = [torch.full((4, 1), float(i)) for i in range(30)]
        >>> ended = fit(model, batches, AdamW(model.parameters()), lambda model, x: (model(x) - x).square().mean(),
        ...             steps=20, callbacks=[lambda record: print(record["event"], record["step"])])
        train 10
        train 20
        >>> ended.step, ended.reason
        (20, 'done')
    """
    return Loop(model, data, optimizer, loss, steps=steps, **options).run()


class Loop:
    """The training loop. A run that was killed goes on from its newest checkpoint, if it is begun with equal arguments.

    Arguments:
        model: a module, a `fasttrain.parallel.DataParallel`, or what `fasttrain.parallel.shard` returned.
        data: batches of this rank, each for a whole step: a `fasttrain.data.Loader`, or any iterable. Its position is
            in checkpoints if it has `state_dict` and `load_state_dict`.
        optimizer: of the model's parameters; of this package, a `fasttrain.parallel.Zero`, or torch's.
        loss: from (model, micro-batch) to the mean loss, or to (sum, number of items); with a pipeline from (model,
            batch) to (inputs, targets): see `Stepper`.
        pipeline: a `fasttrain.parallel.pipeline.Pipeline` of the model, which cuts batches into micro-batches itself.
        steps: of the whole run.
        accumulate: micro-batches of a step (`split`).
        batch_size: a schedule of the samples in a step, as `fasttrain.schedules.rounded` makes; the data is a
            `fasttrain.data.Loader`, whose own size `tokens` belongs to. None: it stays.
        clip: largest norm of the gradient; 0 does not clip.
        schedule: what is stepped after each step: a `fasttrain.schedules.Scheduler`, or torch's. A `Plateau` in it, and
            torch's ReduceLROnPlateau, are told the `metric` of each evaluation.
        precision: what the loss is computed in, and whether it is scaled; None: fp32.
        evaluate: from the number of steps to a dict of numbers, the same on every rank; called every `evaluate_every`.
        metric: the one of them that guards and `Keep(best=)` look at; lower is better unless a guard says otherwise.
        bad_steps: a `fasttrain.guards.NonFinite`: ends the run after so many skipped steps in a row.
        spikes: a `fasttrain.guards.LossSpikes`: goes back to a checkpoint, and past the batches.
        early: a `fasttrain.guards.EarlyStopping`, asked at each evaluation.
        gap: a `fasttrain.guards.Gap`, likewise.
        checkpoints: a `fasttrain.checkpoint.Checkpointer`. Saved: on its schedule, at the end, when the run is asked to
            stop, and on an exception that leaves parameters and states as they are after a whole step.
        stopping: a `fasttrain.checkpoint.Stopping`: SIGTERM and Ctrl-C end the run after a step, saved.
        keeps: further entries of the saved state, by name; see `Checkpointer.save`.
        tokens: of a step on all ranks together, for tokens per second.
        flops, peak: operations of a step on this rank, and the most that its device can do per second, for `mfu`.
        profile: a `fasttrain.train.profiling.Profile`, entered by the caller.
        callbacks: called with each record: a dict with "event", "step" and more, of JSON values, on every rank.
        log_every: steps between records of training.
    """

    def __init__(self, model: Any, data: Any, optimizer: Any, loss: Loss, *, steps: int, accumulate: int = 1,
                 batch_size: Callable[[int], float] | None = None, clip: float = 1.0, schedule: Any = None,
                 precision: Precision | None = None, pipeline: Pipeline | None = None,
                 evaluate: Callable[[int], Record] | None = None, evaluate_every: int = 0, metric: str = "loss",
                 bad_steps: NonFinite | None = None, spikes: LossSpikes | None = None,
                 early: EarlyStopping | None = None, gap: Gap | None = None,
                 checkpoints: Checkpointer | None = None, stopping: Stopping | None = None,
                 keeps: Mapping[str, Any] | None = None, tokens: int = 0, flops: float = 0.0, peak: float | None = None,
                 profile: Any = None, callbacks: Sequence[Callable[[Record], None]] = (), log_every: int = 10):
        if spikes is not None and spikes.patience is not None and (checkpoints is None or not hasattr(data, "rewind")):
            raise ValueError("spikes with patience go back to a checkpoint and past batches: give checkpoints, and "
                             "data that can rewind (fasttrain.data.Loader), or LossSpikes(patience=None)")
        self._plateau = schedule if isinstance(schedule, ReduceLROnPlateau) else getattr(schedule, "plateau", None)
        check_evaluations(evaluate, evaluate_every, (early, gap, self._plateau))
        check_whole(accumulate=accumulate, log_every=log_every)
        if batch_size is not None and not hasattr(data, "resize"):
            raise ValueError("batch_size is a schedule, and the data cannot change its batches: give a "
                             "fasttrain.data.Loader")
        self.batch_size, self._unit = batch_size, 0 if batch_size is None else data.batch_size
        clock = PhaseClock(device_of(model))
        precision = precision or Precision("fp32", clock.device)
        scaler = precision.scaler()
        self.stepper = Stepper(model, optimizer, loss, clip=clip, context=precision.autocast, scaler=scaler,
                               pipeline=pipeline, clock=clock)
        self.meter, self.tidy = Meter(clock, tokens, flops, peak), Tidy()
        self.data, self.optimizer, self.schedule, self.accumulate = data, optimizer, schedule, accumulate
        self.evaluate, self.evaluate_every, self.metric = evaluate, evaluate_every, metric
        self.bad_steps, self.spikes, self.early, self.gap = bad_steps or NonFinite(), spikes, early, gap
        self.stopping, self.profile, self.callbacks, self.log_every = stopping, profile, callbacks, log_every
        parts = {"model": self.stepper.model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler,
                 "data": data, "stepper": self.stepper, "meter": self.meter, "bad_steps": self.bad_steps,
                 "spikes": spikes, "early": early, "gap": gap, "rng": Rng(),
                 "wire": getattr(self.stepper.reducer, "method", None), "loop": self}
        self.keeper = Keeper(checkpoints, {name: part for name, part in parts.items() if hasattr(part, "state_dict")}
                             | {"accumulate": accumulate} | dict(keeps or {}), self.stepper.wire)
        self.steps, self.step, self.ended, self.metrics = steps, 0, "", Record()
        self._places: dict[int, tuple[int, int]] = {}  # of steps under way: their batches' first sample, and how many
        self._spike: SpikeDecision | None = None
        self._begun = self._owes = False  # the evaluation that belongs after this step is not made yet

    def begin(self) -> Loaded | None:
        """Load the newest checkpoint that can be used, and return what was loaded; `run` does it if you do not."""
        self._begun = True
        self.optimizer.zero_grad()  # what a run before, or an exception in it, has left
        if (loaded := self.keeper.resume()) is not None:
            self.step, self.metrics = self.stepper.steps, dict(loaded.metrics)
            self.meter.seconds = self.metrics.pop("seconds", 0.0)
            passed_over = "".join(f"; {path.name} cannot be used: {reason}" for path, reason in loaded.skipped)
            was = loaded.values.get("accumulate", self.accumulate)
            changed = "" if was == self.accumulate else f"; accumulate was {was} and is {self.accumulate}"
            self.tell("resume", text=f"resumed from {loaded.path.name}{changed}{passed_over}")
        elif self.spikes is not None and self.spikes.patience is not None:
            self._save()  # to go back to
        return loaded

    def run(self) -> Fitted:
        """All steps that are left, from the newest checkpoint on."""
        if not self._begun:
            self.begin()
        batches = iter(self.data)
        try:
            if self._owes:
                self._evaluate()
            while self.step < self.steps and not self.ended:
                self._make_step(self._next(batches))
                self._look_around()
            self._save(last=True)
        except Exception as error:
            if not self.stepper.stepping:
                self.keeper.save_after(error, self.step, self.metrics)
            raise
        return Fitted(self.step, self.ended or "done", self.metrics, self.stepper.traffic)

    def _next(self, batches: Iterator[Any]) -> Any:
        with self.meter.clock("data"):
            if self.batch_size is not None:
                self.data.resize(round(self.batch_size(self.step)))
            self.keeper.taking()
            first = self._place()
            if (batch := next(batches, None)) is None:
                raise ValueError(f"the data ended after {self.step} of {self.steps} steps: give more, or data that "
                                 "begins again")
            self._places[self.step + 1] = first, self._place() - first
        return batch

    def _place(self) -> int:
        """The number of the next sample, where the data knows it."""
        index = getattr(self.data, "index", 0)
        return index if isinstance(index, int) else 0

    def _make_step(self, batch: Any) -> None:
        self.stepper.stop = self.stopping is not None and self.stopping.asked
        self.stepper.run([batch] if self.stepper.pipeline is not None else split(batch, self.accumulate))
        self.keeper.taken()
        self.step = self.stepper.steps
        rate = self.optimizer.param_groups[0]["lr"]
        self.rate = rate.clone() if isinstance(rate, Tensor) else rate  # read for the log only: it may lie on a device
        if self.schedule is not None and self.schedule is not self._plateau:
            self.schedule.step()
        if self.profile is not None:
            self.profile.step()

    def _look_around(self) -> None:
        """What belongs after this step: its numbers, a line of the log, an evaluation, a checkpoint."""
        last = self.step == self.steps
        log = last or self.step % self.log_every == 0
        look = self.evaluate is not None and (last or self.step % self.evaluate_every == 0)
        self._owes = look
        for numbers in self.stepper.arrived(all_of_them=log or look):
            self._judge(numbers)
        if log:
            self.tidy.look()
            self.tell("train", lr=float(self.rate), skipped=self.bad_steps.skipped, **self.meter.read())
        if look:
            self._evaluate()
        if self.keeper.due(self.step) and self._spike is None:
            self._save()
        if self._spike is not None:
            self._go_back(self._spike)

    def _save(self, last: bool = False) -> None:
        for numbers in self.stepper.arrived(all_of_them=True):
            self._judge(numbers)
        with self.meter.clock("checkpoint"):
            self.keeper.save(self.step, {**self.metrics, "seconds": self.meter.total_s()}, last)

    def _go_back(self, spike: SpikeDecision) -> None:
        """Load the newest checkpoint from before a spike, and leave its batches out."""
        assert self.spikes is not None
        (since, first, _), (_, start, count) = spike.skip[0], spike.skip[-1]
        self.stepper.arrived(all_of_them=True)
        back = self.keeper.go_back(since, first, start + count - first)
        self.spikes.rolled_back()
        self.step, self._spike, self._places = back, None, {}
        self.tell("resume", text=f"went back to step {back}; samples {first} to {start + count - 1} are left out")

    def _judge(self, numbers: Numbers) -> None:
        """What the guards make of a step."""
        first, count = self._places.pop(numbers.step)
        self.meter.add(numbers, count / self._unit if self._unit else 1.0)
        judged = self.bad_steps.update(numbers.step, numbers.skipped, numbers.loss, norm=numbers.norm,
                                       batch=[first, count], scale=numbers.scale, names=numbers.names)
        if judged.kind == "bad":
            what = "a gradient" if judged.names or math.isfinite(numbers.loss) else "the loss"
            named = f" in {', '.join(judged.names)}" if judged.names else ""
            self.tell("skipped", text=f"skipped step {judged.step}, loss {judged.loss}, samples {first} to "
                                      f"{first + count - 1}: {what} is not finite{named}")
        if numbers.stop:
            self.ended = ASKED
        if self.spikes is not None and judged.kind != "overflow":
            decision = self.spikes.update(numbers.step, numbers.loss, batch=[numbers.step, first, count])
            if decision.spike:
                self.tell("spike", text=f"the loss of step {numbers.step} is {numbers.loss:.4f}, {decision.score:.1f} "
                                        f"deviations above {decision.middle}")
            if decision.stop:
                self.ended = f"the loss went up at step {numbers.step} again, after {self.spikes.most} rollbacks"
            if decision.rollback:
                self._spike = decision

    def _evaluate(self) -> None:
        assert self.evaluate is not None
        with self.meter.paused():
            asked = self.early is not None or self._plateau is not None
            self.metrics = measured(self.evaluate(self.step), self.metric if asked else None)
        told = dict(self.metrics)
        if self.gap is not None:
            told["gap"] = self.gap.update(self.meter.last_loss, self.metrics.get("loss", float("nan"))).gap
        if self.early is not None:
            decision = self.early.update(self.metrics[self.metric], self.step)
            told["patience_left"] = decision.patience_left
            self.ended = self.ended or decision.reason or ""
        if isinstance(self._plateau, ReduceLROnPlateau):
            self._plateau.step(self.metrics[self.metric])
        elif self._plateau is not None:
            self._plateau.update(self.metrics[self.metric])
            self.schedule.step(self.schedule.last_epoch)  # the next step has it, as a resumed run's would
        self._owes = False
        self.tell("validation", **told)

    def state_dict(self) -> Record:
        """JSON values: whether and why a guard has ended the run, and what is still to be done after this step."""
        return {"ended": "" if self.ended == ASKED else self.ended, "limits": self._limits(), "owes": self._owes}

    def load_state_dict(self, state: Record) -> None:
        """Take over what `state_dict` returned. A run that a guard has ended stays so, unless its limits are others."""
        self.ended = state["ended"] if state["limits"] == self._limits() else ""
        self._owes = state["owes"] and self.evaluate is not None

    def _limits(self) -> list[Any]:
        early, spikes = self.early, self.spikes
        return [early and [early.patience, early.goal, early.best.min_delta], spikes and [spikes.patience, spikes.most]]

    def tell(self, event: str, **values: Any) -> None:
        """Give a record to all callbacks."""
        for callback in self.callbacks:
            callback({"event": event, "step": self.step, **values})


def device_of(model: Any) -> torch.device:
    """Where the parameters of a model lie, wrapped or not."""
    return next(getattr(model, "module", model).parameters()).device
