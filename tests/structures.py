"""Every choice of options that the coefficients of a built-in rule have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from fasttrain.rule import Rule

NUMBER = 0.0
FLAGS = ("decoupled_weight_decay", "no_prox", "correct_bias", "bias_correction", "always_adapt", "adapt")
CHOICES: dict[str, tuple[Any, ...]] = {
    "betas": ((NUMBER, NUMBER),), "etas": ((NUMBER, NUMBER),), "step_sizes": ((NUMBER, NUMBER),),
    "clamp": ((NUMBER, NUMBER),), "beta3_warmup": (None, NUMBER), "alpha_warmup": (None, NUMBER),
    **dict.fromkeys(FLAGS, (False, True))}
THREE_BETAS = ("Adan", "AdEMAMix", "AdEMAMixWithoutFast")


def choices(rule: Rule) -> Iterator[Mapping[str, Any]]:
    """Hyperparameters of a built-in rule of each structure that its optimizer gives it; the numbers are zeros."""
    three = {"betas": ((NUMBER,) * 3,)} if rule.name in THREE_BETAS else {}
    columns = [{**CHOICES, **three}.get(name, (NUMBER,)) for name in rule.hyperparameters]
    for values in product(*columns):
        yield dict(zip(rule.hyperparameters, values, strict=True))
