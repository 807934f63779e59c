"""How the model lies on the processes, by `--zero`, and what that changes for the loop."""

from __future__ import annotations

from torch import nn

from fasttrain.dist.watcher import Watcher
from fasttrain.dist.wire import Wire
from fasttrain.parallel import DataParallel, shard
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
