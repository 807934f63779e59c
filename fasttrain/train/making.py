"""From options to a model, and what one of its steps takes."""

from __future__ import annotations

from typing import Any

import torch

from fasttrain.dist.mesh import Mesh
from fasttrain.precision.mixed import Precision
from fasttrain.train.blocks import compile_blocks, recompute
from fasttrain.train.config import TrainConfig
from fasttrain.train.model import GPT, VOCABULARY
from fasttrain.train.usage import count_flops


def make(config: TrainConfig, device: torch.device, vocabulary: int = VOCABULARY) -> Any:
    """The whole model of a run with its first weights, its blocks recomputed and compiled."""
    return finish(config, precision_of(config, device).cast(blank(config, None, vocabulary).to(device)))


def blank(config: TrainConfig, mesh: Mesh | None, vocabulary: int = VOCABULARY) -> GPT:
    """The whole model of a run.

    Arguments:
        mesh: along whose axis "expert" experts are divided.
    """
    return GPT(config.layers, config.width, config.heads, config.sequence, config.ngrams, config.rows, vocabulary,
               config.kv_heads, config.gated, config.tied, config.experts, config.top_k, mesh)


def finish(config: TrainConfig, model: Any) -> Any:
    """What is done to the blocks of a model before it is wrapped: they are recomputed, and compiled."""
    if config.recompute is not None:
        recompute(model, config.recompute, blocks="blocks")
    if config.compile:
        compile_blocks(model, blocks="blocks")
    return model


def precision_of(config: TrainConfig, device: torch.device | str = "cpu") -> Precision:
    """What a run computes in and keeps; the tables of rotary positions stay in fp32."""
    return Precision(config.precision, device, keep=("cos", "sin") if config.precision.endswith("pure") else ())


def flops_of_step(config: TrainConfig, vocabulary: int = VOCABULARY) -> float:
    """Floating-point operations of a step in each process, forward and backward.

    Example:
        >>> flops_of_step(TrainConfig(layers=1, width=32, heads=2, ngrams=1, batch=2, processes=2, sequence=16))
        2064384.0
    """
    with torch.device("meta"):
        model, sequence = blank(config, None, vocabulary), torch.zeros(1, config.sequence, dtype=torch.long)
    return 3.0 * count_flops(lambda: model(sequence))[1] * config.batch / config.processes
