"""How well the model predicts text that it has not seen."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from fasttrain.data.dataset import TokenDataset
from fasttrain.data.order import overlapping
from fasttrain.dist.wire import Wire
from fasttrain.train.config import TrainConfig
from fasttrain.train.making import precision_of
from fasttrain.train.model import VOCABULARY
from fasttrain.train.tokens import cut

Record = dict[str, Any]


def validation(model: nn.Module, stream: np.ndarray | TokenDataset, config: TrainConfig, wire: Wire,
               most: int | None, unit: str = "byte", vocabulary: int = VOCABULARY) -> Record:
    """``bits_per_byte`` over ``bytes`` of held-out text; it counts `most` windows (None: all the text).

    Args:
        unit: "token": ``bits_per_token`` over ``tokens``.
    """
    nats, count = held_out_nats(model, stream, config, wire, most, vocabulary)
    return {f"bits_per_{unit}": nats / count / math.log(2), f"{unit}s": count}


@torch.no_grad()
def held_out_nats(model: nn.Module, stream: np.ndarray | TokenDataset, config: TrainConfig, wire: Wire,
                  most: int | None, vocabulary: int = VOCABULARY) -> tuple[float, int]:
    """The sum of the model's cross-entropy over held-out bytes or tokens in nats, and how many that was.

    Each process reads every size-th batch of windows; their sums and counts are added. The first of all, which nothing
    precedes, costs log `vocabulary`. The model is called as often on every process, because a sharded one is
    gathered in each call: a process with no windows left reads some that do not count.

    Args:
        stream: integers, shape (bytes,), or the tokens of a data set.
        most: at most so many windows, evenly spaced over the stream; None for all.
    """
    starts, fresh_from = overlapping(len(stream), config.sequence)
    chosen = np.arange(len(starts))
    if most is not None and len(starts) > most:
        chosen = np.linspace(0, len(starts) - 1, most).astype(int)
    sums = torch.zeros(2, dtype=torch.float64, device=wire.device)
    if wire.rank == 0 and most is None:
        sums += sums.new_tensor([math.log(vocabulary), 1])
    at_once = max(1, config.batch // wire.size)
    for turn in range(0, len(chosen), wire.size * at_once):
        mine = chosen[turn + wire.rank * at_once :][:at_once]
        some = mine if len(mine) else chosen[:1]
        windows = to_device(cut(stream, starts[some], config.sequence + 1), wire.device)
        with precision_of(config, wire.device).autocast():
            logits_BTV = model(windows[:, :-1])
        since = fresh_from[some, None] if len(mine) else config.sequence
        fresh_BT = torch.from_numpy(np.arange(config.sequence)[None] >= since).to(wire.device)
        nats = nn.functional.cross_entropy(logits_BTV[fresh_BT].float(), windows[:, 1:][fresh_BT], reduction="none")
        sums += torch.stack([nats.sum(dtype=torch.float64), fresh_BT.sum(dtype=torch.float64)])
    nats_sum, count = wire.sum_(sums).tolist()
    return nats_sum, round(count)


def to_device(windows: np.ndarray, device: torch.device) -> torch.Tensor:
    """Windows of any integers as those that an embedding takes."""
    return torch.from_numpy(windows).to(device, non_blocking=True).long()
