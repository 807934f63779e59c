"""From options to a model, and what one of its steps takes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fasttrain.dist.mesh import Mesh
from fasttrain.parallel.building import materialize
from fasttrain.precision.mixed import Precision
from fasttrain.train.blocks import compile_blocks, recompute
from fasttrain.train.config import TrainConfig
from fasttrain.train.model import GPT, VOCABULARY
from fasttrain.train.usage import count_flops


def make(config: TrainConfig, device: torch.device, vocabulary: int = VOCABULARY) -> Any:
    """The whole model of a run with its first weights, its blocks recomputed and compiled."""
    return finish(config, blank(config, None, vocabulary), device)


def blank(config: TrainConfig, mesh: Mesh | None, vocabulary: int = VOCABULARY) -> Any:
    """The whole model of a run, on the meta device, in the dtypes in which it is kept.

    Arguments:
        mesh: along whose axis "expert" experts are divided.
    """
    with torch.device("meta"):
        model = GPT(config.layers, config.width, config.heads, config.sequence, config.ngrams, config.rows, vocabulary,
                    config.kv_heads, config.gated, config.tied, config.experts, config.top_k, mesh)
    return precision_of(config).cast(model)


def finish(config: TrainConfig, model: Any, device: torch.device) -> Any:
    """A model, or what this process has of it, with its first weights; its blocks recomputed, and compiled."""
    materialize(model, seed=config.seed, device=device)
    if len(model.blocks) == 0:  # in a V the first process may have embedding and head alone
        return model
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
    config = dataclasses.replace(config, precision="fp32")  # on the meta device autocast does not make dtypes fit
    model, sequence = blank(config, None, vocabulary), torch.zeros(1, config.sequence, dtype=torch.long, device="meta")
    return 3.0 * count_flops(lambda: model(sequence))[1] * config.batch / config.processes
