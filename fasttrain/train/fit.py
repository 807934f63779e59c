"""The training loop, to be read in one sitting. It uses only parts that work alone in somebody else's loop."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttrain.precision.loss_scale import LossScaler
from fasttrain.train.clock import PhaseClock
from fasttrain.train.meter import Meter
from fasttrain.train.stepper import Loss, Stepper
from fasttrain.train.traffic import Traffic

Record = dict[str, Any]


@dataclasses.dataclass
class Progress:
    """How far a run is: the part of its state that is the loop's own.

    Attributes:
        step: steps made, skipped ones included.
        skipped: steps in which a gradient was not finite.
        seconds: in the loop, over all parts of a run that was resumed.
        loss_sum, loss_steps: of the steps since the last line of the log.
        ended: why the loop ended; empty while it runs.
    """

    step: int = 0
    skipped: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    loss_steps: int = 0
    ended: str = ""

    def state_dict(self) -> Record:
        """JSON values."""
        return dataclasses.asdict(self) | {"ended": ""}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, value)


class Fitted(NamedTuple):
    """How a run ended.

    Attributes:
        progress: how far it came, and why it ended.
        traffic: what its steps have sent; None in one process alone.
    """

    progress: Progress
    traffic: Traffic | None


def fit(model: Any, data: Iterable[Any], optimizer: Any, loss: Loss, *, steps: int, accumulate: int = 1,
        clip: float = 1.0, schedule: Any = None, tokens: int = 0,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext, scaler: LossScaler | None = None,
        evaluate: Callable[[int], Record] | None = None, evaluate_every: int = 0,
        guards: Sequence[Any] = (), checkpoints: Any = None, stopping: Any = None,
        callbacks: Sequence[Callable[[Record], None]] = (), log_every: int = 10) -> Fitted:
    """Train. A run that was killed goes on from its newest checkpoint: call it again with equal arguments."""
    progress = Progress()
    clock = PhaseClock(device_of(model))
    stepper = Stepper(model, optimizer, loss, clip=clip, context=context, scaler=scaler, clock=clock)
    meter = Meter(clock, tokens)

    def tell(event: str, **values: Any) -> None:
        for callback in callbacks:
            callback({"event": event, "step": progress.step, **values})

    batches = iter(data)
    begun = time.perf_counter() - progress.seconds
    while progress.step < steps and not progress.ended:
        with clock("data"):
            batch = next(batches)
        stepper.run(split(batch, accumulate))
        progress.step += 1
        rate = optimizer.param_groups[0]["lr"]
        if schedule is not None:
            schedule.step()
        last = progress.step == steps
        log_now = last or progress.step % log_every == 0
        look = evaluate is not None and evaluate_every and progress.step % evaluate_every == 0 and not last
        for numbers in stepper.arrived(all_of_them=log_now or look):
            meter.add(numbers)
            progress.skipped += numbers.skipped
            progress.ended = "a request to stop" if numbers.stop else ""
        if log_now:
            progress.seconds = time.perf_counter() - begun
            tell("train", lr=rate, seconds=progress.seconds, skipped=progress.skipped, **meter.read())
        if look:
            with meter.paused():
                tell("validation", **evaluate(progress.step))
    return Fitted(progress, stepper.traffic)


def device_of(model: Any) -> torch.device:
    """Where the parameters of a model lie, wrapped or not."""
    return next(getattr(model, "module", model).parameters()).device


def split(batch: Any, parts: int) -> list[Any]:
    """A batch in micro-batches, along the first dimension of its tensors.

    Arguments:
        batch: a tensor, or a dict, list or tuple of them (of equal lengths); other values go to all parts.

    Raises:
        ValueError: it cannot be divided into as many parts of one size.

    Example:
        >>> import torch
        >>> split({"x": torch.arange(4), "scale": 2.0}, 2)
        [{'x': tensor([0, 1]), 'scale': 2.0}, {'x': tensor([2, 3]), 'scale': 2.0}]
    """
    if parts == 1:
        return [batch]
    if isinstance(batch, Tensor):
        if len(batch) % parts:
            raise ValueError(f"a batch of {len(batch)} cannot be divided into {parts} micro-batches of one size")
        return list(batch.chunk(parts))
    if isinstance(batch, Mapping):
        divided = {name: split(value, parts) for name, value in batch.items()}
        return [{name: values[i] for name, values in divided.items()} for i in range(parts)]
    if isinstance(batch, (list, tuple)):
        inner = [split(value, parts) for value in batch]
        return [type(batch)(values[i] for values in inner) for i in range(parts)]
    return [batch] * parts
