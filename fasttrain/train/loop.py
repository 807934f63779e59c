"""The training loop, and validation. Every part works alone in somebody else's loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from fasttrain.data.order import overlapping
from fasttrain.data.windows import Windows
from fasttrain.dist.wire import Wire
from fasttrain.optim import Optimizer
from fasttrain.parallel import DataParallel, Reducer, Zero
from fasttrain.train.clock import PhaseClock
from fasttrain.train.config import TrainConfig
from fasttrain.train.model import loss_of
from fasttrain.train.schedules import warmup_cosine
from fasttrain.train.text import Text

QUICK_WINDOWS = 64  # of a validation during the run; the one at its end reads everything
Record = dict[str, Any]


def train(config: TrainConfig, model: DataParallel, optimizer: torch.optim.Optimizer, text: Text,
          emit: Callable[[Record], None]) -> None:
    """Run `config.steps` steps, and hand every record (a dict of JSON values, the same on each process) to `emit`.

    Records: ``{"event": "train", step, loss, lr, tokens_per_s, seconds, share}``, loss in nats per byte, averaged over
    the steps since the last; ``{"event": "validation", step, bits_per_byte, bytes}``; and once
    ``{"event": "wire", step, bytes, formula}``: what a rank sent for the gradients of a step, counted and by formula.

    Raises:
        FloatingPointError: the loss is not finite, on every process in the same step.
    """
    windows = Windows(text.train, config.sequence, config.seed)
    reducer = model.reducer
    wire, sent = reducer.wire, 0
    mine = config.batch // wire.size
    accumulate = model.accumulate(config.accumulate)
    reducer.record_timeline()
    peaks = [group["lr"] for group in optimizer.param_groups]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    clock = PhaseClock(wire.device)
    losses = torch.zeros((), device=wire.device)
    begun = logged_at = time.perf_counter()
    logged = 0

    emit(validation(0, model, text.held_out, config, wire, QUICK_WINDOWS))
    for step in range(config.steps):
        wire.watch.step = step
        with clock("data"):
            batch = to_device(windows.batch(step * config.batch + wire.rank * mine, mine), wire.device)
        sent -= wire.sent
        with clock("forward_backward"):
            for part in batch.chunk(config.accumulate):
                with accumulate():
                    with autocast(config, wire.device):
                        loss = loss_of(model, part) / config.accumulate
                    loss.backward()
                losses += loss.detach()
        clock.move("forward_backward", "communication", reducer.exposed)
        with clock("optimizer"):
            clip(optimizer, params, reducer, config.clip)
            share = warmup_cosine(step, config.steps, config.warmup)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * share
            optimizer.step()
            optimizer.zero_grad()
        sent += wire.sent

        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            mean_loss = wire.mean_(losses).item() / (done - logged)
            if not math.isfinite(mean_loss):
                raise FloatingPointError(
                    f"the loss of steps {logged + 1} to {done} is {mean_loss}; use a lower --lr or a longer --warmup")
            seconds = clock.take()
            now = time.perf_counter()
            emit({
                "event": "train", "step": done, "loss": mean_loss, "lr": peaks[0] * share,
                "tokens_per_s": (done - logged) * config.batch * config.sequence / (now - logged_at),
                "seconds": now - begun,
                "share": {phase: s / sum(seconds.values()) for phase, s in seconds.items()},
            })
            losses.zero_()
            logged, logged_at = done, now
        if done % config.validate_every == 0 and done < config.steps:
            before = time.perf_counter()
            emit(validation(done, model, text.held_out, config, wire, QUICK_WINDOWS))
            logged_at += time.perf_counter() - before  # tokens/s are those of training
    emit({"event": "wire", "step": config.steps, "bytes": sent / config.steps, "formula": reducer.bytes_per_step()})
    emit(validation(config.steps, model, text.held_out, config, wire, None))


def clip(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], reducer: Reducer, largest: float) -> None:
    """Clip the gradients' norm, which the reducer knows; only optimizers of torch have them rewritten. 0: do not."""
    if largest and isinstance(optimizer, Zero):
        optimizer.clip_grad_norm_(largest)
    elif largest and isinstance(optimizer, Optimizer):
        optimizer.clip_grad_norm_(largest, norm=reducer.grad_norm())
    elif largest:
        nn.utils.clip_grads_with_norm_(params, largest, reducer.grad_norm())


def validation(step: int, model: nn.Module, stream: np.ndarray, config: TrainConfig, wire: Wire,
               most: int | None) -> Record:
    """The validation record after `step` steps; it counts `most` windows (None: all the text)."""
    nats, count = held_out_nats(model, stream, config, wire, most)
    return {"event": "validation", "step": step, "bits_per_byte": nats / count / math.log(2), "bytes": count}


@torch.no_grad()
def held_out_nats(model: nn.Module, stream: np.ndarray, config: TrainConfig, wire: Wire,
                  most: int | None) -> tuple[float, int]:
    """The sum of the model's cross-entropy over held-out bytes in nats, and how many bytes that was.

    Each process reads every size-th batch of windows; their sums and counts are added. The first byte of the text,
    which nothing precedes, costs log 256.

    Args:
        stream: uint8, shape (bytes,).
        most: at most so many windows, evenly spaced over the stream; None for all.
    """
    starts, fresh_from = overlapping(len(stream), config.sequence)
    chosen = np.arange(len(starts))
    if most is not None and len(starts) > most:
        chosen = np.linspace(0, len(starts) - 1, most).astype(int)
    sums = torch.zeros(2, dtype=torch.float64, device=wire.device)
    if wire.rank == 0 and most is None:
        sums += sums.new_tensor([math.log(256), 1])
    at_once = max(1, config.batch // wire.size)
    for i in range(wire.rank * at_once, len(chosen), wire.size * at_once):
        some = chosen[i : i + at_once]
        windows = to_device(np.stack([stream[s : s + config.sequence + 1] for s in starts[some]]), wire.device)
        with autocast(config, wire.device):
            logits_BTV = model(windows[:, :-1])
        fresh_BT = torch.from_numpy(np.arange(config.sequence) >= fresh_from[some, None]).to(wire.device)
        nats = nn.functional.cross_entropy(logits_BTV[fresh_BT].float(), windows[:, 1:][fresh_BT], reduction="none")
        sums += torch.stack([nats.sum(dtype=torch.float64), fresh_BT.sum(dtype=torch.float64)])
    nats_sum, count = wire.sum_(sums).tolist()
    return nats_sum, round(count)


def to_device(windows: np.ndarray, device: torch.device) -> torch.Tensor:
    """uint8 windows as integers that an embedding takes."""
    return torch.from_numpy(windows).to(device, non_blocking=True).long()


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """The context in which the model runs."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
