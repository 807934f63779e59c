"""How the model lies on the processes, by `--zero`, and what that changes for the loop."""

from __future__ import annotations

import torch
from torch import nn

from fasttrain.dist.watcher import Watcher
from fasttrain.dist.wire import Wire
from fasttrain.optim import Optimizer
from fasttrain.parallel import DataParallel, Zero, shard
from fasttrain.parallel.sharded import Sharded
from fasttrain.train.config import TrainConfig

FLOAT = 4  # bytes of a parameter, and of its gradient unless --wire says otherwise


def divide(config: TrainConfig, model: nn.Module, wire: Wire) -> DataParallel | Sharded:
    """Let the processes of `wire` share the model: whole on each, or at stage 3 a part on each.

    Make the optimizer afterwards (`recipe.build`).
    """
    if config.zero < 3:
        return DataParallel(model, mesh=wire, wire=config.wire, broadcast_buffers=False)
    watch = wire.watch if isinstance(wire.watch, Watcher) else False
    return shard(model, blocks="blocks", wire=config.wire, timeout_s=wire.timeout_s, watch=watch)


def wire_of(model: DataParallel | Sharded) -> Wire:
    """The wire by which gradients and parameters travel."""
    return model.everyone if isinstance(model, Sharded) else model.reducer.wire


def callable_of(model: DataParallel | Sharded) -> nn.Module:
    """What is called with a batch."""
    return model.module if isinstance(model, Sharded) else model


def bytes_by_formula(config: TrainConfig, model: DataParallel | Sharded) -> float:
    """What a process sends in a step, by the formula of its stage (docs/buckets.md)."""
    if isinstance(model, Sharded):
        return model.bytes_per_step(FLOAT // 2 if config.wire == "bf16" else FLOAT, FLOAT, config.accumulate)
    return model.reducer.bytes_per_step()


def all_counted(model: DataParallel | Sharded) -> bool:
    """Whether the wire counts all that is sent: a sharded model on NCCL sends by torch."""
    return not isinstance(model, Sharded) or model.wire.backend == "gloo" or model.wire.size == 1


def clip(optimizer: torch.optim.Optimizer, model: DataParallel | Sharded, largest: float) -> None:
    """Clip the norm of the gradients of all processes; only optimizers of torch have them rewritten. 0: do not.

    A reducer knows the norm already. Of shards it is the optimizer, or torch, that measures it.
    """
    if not largest:
        return
    if isinstance(optimizer, Zero):
        optimizer.clip_grad_norm_(largest)
    elif isinstance(optimizer, Optimizer):
        optimizer.clip_grad_norm_(largest, norm=None if isinstance(model, Sharded) else model.grad_norm())
    else:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if isinstance(model, Sharded):
            nn.utils.clip_grad_norm_(params, largest)
        else:
            nn.utils.clip_grads_with_norm_(params, largest, model.grad_norm())
