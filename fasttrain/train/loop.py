"""The main job: its data, validation and records around the loop of `fasttrain.train.fit`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fasttrain.data import Loader, Windows
from fasttrain.parallel import DataParallel
from fasttrain.parallel.sharded import Sharded
from fasttrain.schedules import warmup_cosine
from fasttrain.schedules.scheduler import Scheduler
from fasttrain.train.config import TrainConfig
from fasttrain.train.division import all_counted, bytes_by_formula, callable_of, wire_of
from fasttrain.train.fit import fit
from fasttrain.train.model import loss_of
from fasttrain.train.text import Text
from fasttrain.train.validation import autocast, validation

QUICK_WINDOWS = 64  # of a validation during the run; the one at its end reads everything
Record = dict[str, Any]


def train(config: TrainConfig, model: DataParallel | Sharded, optimizer: torch.optim.Optimizer, text: Text,
          emit: Callable[[Record], None]) -> None:
    """Run the main job, and hand every record (a dict of JSON values, the same on each process) to `emit`.

    Records: those of `fasttrain.train.fit`, with validations in ``bits_per_byte`` over so many ``bytes``; and once
    ``{"event": "wire", step, bytes, formula, exposed_s}``: what a process sent in a step, counted and by the formula,
    and the seconds of that which nothing hid (None: not measured); means over the run.

    Raises:
        FloatingPointError: the loss is not finite, on every process in the same step.
    """
    wire, called = wire_of(model), callable_of(model)

    def look(step: int, most: int | None = QUICK_WINDOWS) -> Record:
        return validation(called, text.held_out, config, wire, most)

    emit({"event": "validation", "step": 0, **look(0)})
    windows = Windows(text.train, config.sequence, config.seed)
    data = Loader(windows, config.batch, rank=wire.rank, world=wire.size, device=wire.device)
    with data:
        traffic = fit(
        model, data, optimizer, lambda model, batch: loss_of(model, batch["tokens"].long()), steps=config.steps, accumulate=config.accumulate, clip=config.clip,
        schedule=Scheduler(optimizer, lr=warmup_cosine(config.steps, config.warmup)),
        context=lambda: autocast(config, wire.device), tokens=config.batch * config.sequence,
        evaluate=look, evaluate_every=config.validate_every, callbacks=[emit], log_every=config.log_every).traffic
    emit({"event": "wire", "step": config.steps, "formula": bytes_by_formula(config, model),
          **traffic.per_step(all_counted(model))})
    emit({"event": "validation", "step": config.steps, **look(config.steps, None)})
