"""The main job: its data, validation and records around the loop of `fasttrain.train.fit`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fasttrain.checkpoint.checkpointer import Checkpointer
from fasttrain.checkpoint.retention import Keep
from fasttrain.checkpoint.stopping import Stopping
from fasttrain.data.loader import Loader
from fasttrain.data.windows import Windows
from fasttrain.guards.averages import ema
from fasttrain.guards.bad_steps import NonFinite
from fasttrain.guards.spikes import LossSpikes
from fasttrain.guards.stopping import EarlyStopping
from fasttrain.schedules import parse, warmup_cosine
from fasttrain.schedules.scheduler import Scheduler
from fasttrain.train.config import ASKED, TrainConfig
from fasttrain.train.division import Divided, Pipelines, all_counted, bytes_by_formula
from fasttrain.train.dry import STEPS, dry_run
from fasttrain.train.fit import Loop
from fasttrain.train.making import flops_of_step, precision_of
from fasttrain.train.objective import loss_of
from fasttrain.train.profiling import Profile
from fasttrain.train.source import Source
from fasttrain.train.usage import peak_flops
from fasttrain.train.validation import validation

QUICK_WINDOWS = 64  # of a validation during the run; the one at its end reads everything
Record = dict[str, Any]


def train(config: TrainConfig, divided: Divided, optimizer: torch.optim.Optimizer, source: Source,
          emit: Callable[[Record], None], directory: Path | None = None, again: bool = False,
          stopping: Stopping | None = None, profile: Profile | None = None) -> str:
    """Run the main job, and hand every record (a dict of JSON values, the same on each process) to `emit`.

    Records: those of `fasttrain.train.fit`, with validations in ``bits_per_byte`` over so many ``bytes`` (of
    tokens that are not bytes in ``bits_per_token`` over ``tokens``), of plain cross-entropy always; and once
    ``{"event": "wire", step, bytes, formula, exposed_s}``: what a process sent in a step, counted and by the formula,
    and the seconds of that which nothing hid (None: not measured); means over the run. `--dry-run` has one record,
    that of `fasttrain.train.dry`.

    Arguments:
        directory: of the run, the same on every rank, where checkpoints are saved and found; None: nowhere.
        again: the run was begun before, and its log holds records of that.
        stopping: hears of signals that ask to stop.
        profile: of this process.

    Returns:
        Why it ended: "done", what a guard said, or `fasttrain.train.fit.ASKED`.

    Raises:
        TooManyBadSteps: loss or gradients were not finite for so many steps in a row, on every process.
    """
    mesh, called = divided.mesh, divided.called
    precision = precision_of(config, mesh.device)
    precision.check(called, optimizer)

    def look(whole: bool = False) -> Record:
        with ema(optimizer, model=called, required=False):
            return validation(called if pipelines is None else pipelines.sums, source.held_out, config, mesh,
                              None if whole else QUICK_WINDOWS, source.unit, source.vocabulary)

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        tokens = batch["tokens"].long()
        if pipelines is not None:
            return tokens[:, :-1], tokens[:, 1:]
        return loss_of(model, tokens, config.label_smoothing, config.z_loss)

    metric = f"bits_per_{source.unit}"
    with contextlib.ExitStack() as stack:
        pipelines = None
        if config.pipeline > 1:
            pipelines = Pipelines.of(config, divided)
            stack.callback(pipelines.close)
        windows = Windows(source.train, config.sequence, config.seed)
        data = stack.enter_context(
            Loader(windows, config.batch, rank=mesh.replica, world=mesh.replicas, device=mesh.device))
        make_loop: Callable[..., Loop] = partial(
            Loop, divided.model, data, optimizer, loss, pipeline=None if pipelines is None else pipelines.training,
            accumulate=config.accumulate, clip=config.clip, precision=precision,
            schedule=Scheduler(optimizer, lr=parse(config.schedule) if config.schedule else
                               warmup_cosine(config.steps, config.rise)),
            bad_steps=NonFinite(most=config.max_skips), tokens=config.batch * config.sequence)
        if config.dry_run:
            emit(dry_run(config, called, optimizer, look=look, mesh=mesh, steps=lambda record: make_loop(
                steps=STEPS, log_every=1, callbacks=[record]).run()))
            return "done"
        checkpoints = None
        if directory is not None and config.save_every:
            checkpoints = stack.enter_context(Checkpointer(
                directory / "checkpoints", mesh=mesh, every=config.save_every,
                keep=Keep(last=config.keep, best=1, metric=metric)))
        peak = peak_flops(mesh.device, precision.dtype)
        loop = make_loop(
            steps=config.steps, evaluate=lambda step: look(whole=step == config.steps),
            evaluate_every=config.validate_every, metric=metric, checkpoints=checkpoints,
            spikes=LossSpikes(patience=config.spikes or None),
            early=EarlyStopping(config.patience) if config.patience else None,
            profile=profile, stopping=stopping, callbacks=[emit],
            flops=flops_of_step(config, source.vocabulary) if peak else 0.0, peak=peak, log_every=config.log_every)
        if loop.begin() is None:
            if again:
                emit({"event": "begin", "step": 0, "text": "from the beginning: there is no checkpoint"})
            emit({"event": "validation", "step": 0, **look()})
        ended = loop.run()
        if ended.reason not in ("done", ASKED):
            emit({"event": "end", "step": ended.step, "text": ended.reason})
            emit({"event": "validation", "step": ended.step, "whole": True, **look(whole=True)})
    if ended.traffic is not None and ended.traffic.steps:
        emit({"event": "wire", "step": ended.step, "formula": bytes_by_formula(config, divided),
              **ended.traffic.per_step(all_counted(divided.model))})
    if ended.reason == ASKED:
        emit({"event": "end", "step": ended.step, "text": ASKED})
    return ended.reason
