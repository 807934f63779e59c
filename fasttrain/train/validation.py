"""How well the model predicts text that it has not seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fasttrain.data.dataset import TokenDataset
from fasttrain.data.order import overlapping
from fasttrain.dist.mesh import MEAN, Mesh
from fasttrain.dist.wire import Wire
from fasttrain.train.config import TrainConfig
from fasttrain.train.making import precision_of
from fasttrain.train.model import VOCABULARY
from fasttrain.train.objective import IGNORED, nats_of_logits, own_positions, wire_of
from fasttrain.train.tokens import cut

Record = dict[str, Any]


Sums = tuple[Tensor, Tensor]  # of nats, and of positions that count; float64, of shape ()
Forward = nn.Module | Callable[[Tensor, Tensor], Sums]


class Readers(NamedTuple):
    """Who reads which windows.

    Attributes:
        rank, size: of those that read different ones.
        wire: to those whose sums are added.
    """

    rank: int
    size: int
    wire: Wire

    @classmethod
    def of(cls, ranks: Mesh | Wire) -> Readers:
        """Of a mesh, or of ranks all of which read different windows."""
        if isinstance(ranks, Mesh):
            return cls(ranks.replica, ranks.replicas, ranks.wire(*MEAN))
        return cls(ranks.rank, ranks.size, ranks)


def summed(model: nn.Module, inputs: Tensor, targets: Tensor) -> Sums:
    """The sum of nats of the positions of this process whose targets are not `IGNORED`, and how many those are."""
    targets = own_positions(model, targets)
    return nats_of_logits(model(inputs), targets, wire_of(model)), (targets != IGNORED).sum(dtype=torch.float64)


def validation(model: Forward, stream: np.ndarray | TokenDataset, config: TrainConfig, ranks: Mesh | Wire,
               most: int | None, unit: str = "byte", vocabulary: int = VOCABULARY) -> Record:
    """``bits_per_byte`` over ``bytes`` of held-out text; it counts `most` windows (None: all the text).

    Args:
        unit: "token": ``bits_per_token`` over ``tokens``.
    """
    nats, count = held_out_nats(model, stream, config, ranks, most, vocabulary)
    return {f"bits_per_{unit}": nats / count / math.log(2), f"{unit}s": count}


@torch.no_grad()
def held_out_nats(model: Forward, stream: np.ndarray | TokenDataset, config: TrainConfig, ranks: Mesh | Wire,
                  most: int | None, vocabulary: int = VOCABULARY) -> tuple[float, int]:
    """The sum of the model's cross-entropy over held-out bytes or tokens in nats, and how many that was.

    Processes that read different windows take every so many-th batch of them; their sums and counts are added. The
    first token of all, which nothing precedes, costs log `vocabulary`. The model is called as often on every process,
    because those that divide it need each other: a process with no windows left reads some that do not count.

    Args:
        model: a `GPT`, wrapped or not; or what gives, of inputs and targets, what `summed` does.
        stream: integers, shape (bytes,), or the tokens of a data set.
        ranks: a `Mesh`; or a `Wire`, all ranks of which read different windows.
        most: at most so many windows, evenly spaced over the stream; None for all.
    """
    readers = Readers.of(ranks)
    starts, fresh_from = overlapping(len(stream), config.sequence)
    chosen = np.arange(len(starts))
    if most is not None and len(starts) > most:
        chosen = np.linspace(0, len(starts) - 1, most).astype(int)
    device = readers.wire.device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    if readers.wire.rank == 0 and most is None:
        sums += sums.new_tensor([math.log(vocabulary), 1])
    at_once = max(1, config.batch // readers.size)
    for turn in range(0, len(chosen), readers.size * at_once):
        mine = chosen[turn + readers.rank * at_once :][:at_once]
        some = np.resize(mine if len(mine) else chosen, at_once)  # a pipeline takes batches of one size
        windows = to_device(cut(stream, starts[some], config.sequence + 1), device)
        since = np.where(np.arange(at_once) < len(mine), fresh_from[some], config.sequence)[:, None]
        stale = torch.from_numpy(np.arange(config.sequence)[None] < since).to(device)
        targets = windows[:, 1:].masked_fill(stale, IGNORED)
        with precision_of(config, device).autocast():
            sums += torch.stack(summed(model, windows[:, :-1], targets) if isinstance(model, nn.Module) else
                                model(windows[:, :-1], targets))
    nats_sum, count = readers.wire.sum_(sums).tolist()
    return nats_sum, round(count)


def to_device(windows: np.ndarray, device: torch.device) -> torch.Tensor:
    """Windows of any integers as those that an embedding takes."""
    return torch.from_numpy(windows).to(device, non_blocking=True).long()
