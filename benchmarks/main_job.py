"""The main job (`fasttrain train`) in this process: its model, text, order and recipe, with weights kept in any way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fasttrain.data import Windows
from fasttrain.dist.wire import Wire
from fasttrain.optim import Optimizer
from fasttrain.schedules import warmup_cosine
from fasttrain.train import recipe
from fasttrain.train.config import TrainConfig
from fasttrain.train.model import GPT
from fasttrain.train.objective import loss_of
from fasttrain.train.text import Text
from fasttrain.train.validation import validation


class Wide(nn.Module):
    """A model whose weights are widened for the forward: activations and arithmetic are fp32, whatever keeps them.

    Gradients come back through the widening, in the dtype of the weights. A processor without fast 16-bit arithmetic
    trains 16-bit weights so.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        wide = {name: p.float() for name, p in self.model.named_parameters()}
        return functional_call(self.model, wide, inputs)


class Alone(Wire):
    """The wire of a process that has no peers."""

    def __init__(self):
        self.device, self.rank, self.size = torch.device("cpu"), 0, 1

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor


def make(config: TrainConfig, dtype: torch.dtype, options: Mapping[str, Any]) -> tuple[Wide, Optimizer]:
    """Model and optimizer. The first weights are bfloat16 numbers in every dtype, so that all begin at one point.

    Arguments:
        options: of the optimizer, beside its recipe.
    """
    torch.manual_seed(config.seed)
    model = GPT(config.layers, config.width, config.heads, config.sequence, config.ngrams, config.rows)
    for p in model.parameters():
        p.data = p.data.bfloat16().to(dtype)
    return Wide(model), recipe.build(config, model, **options)


def train(config: TrainConfig, text: Text, model: Wide, optimizer: Optimizer, steps: int | None = None) -> None:
    """The first `steps` steps of the job, or all of them."""
    windows = Windows(text.train, config.sequence, config.seed)
    schedule = warmup_cosine(config.steps, config.rise)
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(config.steps if steps is None else steps):
        batch = torch.from_numpy(windows.batch(step * config.batch, config.batch)).long()
        loss_of(model, batch).backward()
        optimizer.clip_grad_norm_(config.clip)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule(step)
        optimizer.step()
        optimizer.zero_grad()


def bits_per_byte(config: TrainConfig, text: Text, model: Wide) -> float:
    """How well the model predicts the whole of the text that it has not seen."""
    return validation(model, text.held_out, config, Alone(), None)["bits_per_byte"]
