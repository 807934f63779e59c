"""The main job: its data, validation and records around the loop of `fasttrain.train.fit`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fasttrain.checkpoint.checkpointer import Checkpointer
from fasttrain.checkpoint.retention import Keep
from fasttrain.data import Loader, Windows
from fasttrain.guards.averages import ema
from fasttrain.guards.bad_steps import NonFinite
from fasttrain.guards.stopping import EarlyStopping
from fasttrain.parallel import DataParallel
from fasttrain.parallel.sharded import Sharded
from fasttrain.schedules import warmup_cosine
from fasttrain.schedules.scheduler import Scheduler
from fasttrain.train.config import TrainConfig
from fasttrain.train.division import all_counted, bytes_by_formula, callable_of, wire_of
from fasttrain.train.fit import Fitted, Loop
from fasttrain.train.model import loss_of
from fasttrain.train.text import Text
from fasttrain.train.validation import autocast, validation

QUICK_WINDOWS = 64  # of a validation during the run; the one at its end reads everything
Record = dict[str, Any]


def train(config: TrainConfig, model: DataParallel | Sharded, optimizer: torch.optim.Optimizer, text: Text,
          emit: Callable[[Record], None], directory: Path | None = None, again: bool = False) -> Fitted:
    """Run the main job, and hand every record (a dict of JSON values, the same on each process) to `emit`.

    Records: those of `fasttrain.train.fit`, with validations in ``bits_per_byte`` over so many ``bytes``; and once
    ``{"event": "wire", step, bytes, formula, exposed_s}``: what a process sent in a step, counted and by the formula,
    and the seconds of that which nothing hid (None: not measured); means over the run.

    Arguments:
        directory: of the run, the same on every rank, where checkpoints are saved and found; None: nowhere.
        again: the run was begun before, and its log holds records of that.

    Raises:
        TooManyBadSteps: loss or gradients were not finite for so many steps in a row, on every process.
    """
    wire, called = wire_of(model), callable_of(model)

    def look(step: int) -> Record:
        with ema(optimizer, model=called, required=False):
            return validation(called, text.held_out, config, wire, None if step == config.steps else QUICK_WINDOWS)

    windows = Windows(text.train, config.sequence, config.seed)
    with contextlib.ExitStack() as stack:
        data = stack.enter_context(
            Loader(windows, config.batch, rank=wire.rank, world=wire.size, device=wire.device))
        checkpoints = None
        if directory is not None and config.save_every:
            checkpoints = stack.enter_context(Checkpointer(
                directory / "checkpoints", wire=wire, every=config.save_every, nice=10,
                keep=Keep(last=config.keep, best=1, metric="bits_per_byte")))
        loop = Loop(
            model, data, optimizer, lambda model, batch: loss_of(model, batch["tokens"].long()), steps=config.steps,
            accumulate=config.accumulate, clip=config.clip, context=lambda: autocast(config, wire.device),
            schedule=Scheduler(optimizer, lr=warmup_cosine(config.steps, config.rise)),
            evaluate=look, evaluate_every=config.validate_every, metric="bits_per_byte", checkpoints=checkpoints,
            bad_steps=NonFinite(most=config.bad_steps),
            early=EarlyStopping(config.patience) if config.patience else None,
            tokens=config.batch * config.sequence, callbacks=[emit], log_every=config.log_every)
        if loop.begin() is None:
            if again:
                emit({"event": "begin", "step": 0, "text": "from the beginning: there is no checkpoint"})
            emit({"event": "validation", "step": 0, **look(0)})
        fitted = loop.run()
        if fitted.reason.startswith("no better"):
            emit({"event": "end", "step": fitted.step, "text": fitted.reason})
            emit({"event": "validation", "step": fitted.step, "final": True, **look(config.steps)})
    if fitted.traffic is not None and fitted.traffic.steps:
        emit({"event": "wire", "step": fitted.step, "formula": bytes_by_formula(config, model),
              **fitted.traffic.per_step(all_counted(model))})
    return fitted
