"""Coefficients that a device computes are the host's, for every rule and setting, at every step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CPU, ROOT, assert_same_bits, needs_native
from scalar_rows import ADAMW, GROUP, compiled, interpreted, on_host
from structures import choices

from fasttrain.kernels import emit_scalars, prologue
from fasttrain.kernels.program import OPERATIONS, program
from fasttrain.kernels.prologue import FIXED, Row
from fasttrain.kernels.trace_scalars import ScalarGraph, trace_scalars
from fasttrain.optim import RULES, STAGES
from fasttrain.optim.equation import reads_step
from fasttrain.rule import Rule

ALL = (*RULES, *STAGES)
LAST = 100_000
POWERS = [1 << i for i in range(1, 17)]
SAMPLE = sorted({*range(1, 201), *(p + d for p in POWERS for d in (-1, 0, 1)), 997, 9_999, 31_415, 99_999, LAST})
COMMON = dict(
    eps=1e-8, weight_decay=0.01, momentum=0.9, dampening=0.1, rho=0.9, lr_decay=0.01, alpha=5.0, lambd=1e-4, eta=0.01,
    mu=0.3, momentum_decay=4e-3, mu_product=0.37, etas=(0.5, 1.2), step_sizes=(1e-6, 50.0), weight_sum=0.02,
    lr_max=1e-3, warmup_steps=1000, r=0.5, weight_lr_power=2.0, ratio=2.0, clamp=(0.0, 10.0), trust_coefficient=1e-3,
    p_sq=31.0, g_sq=0.4, update_sq=2.7, ratio_sq=2.5e6, elements=1e6, beta3_warmup=50_000, alpha_warmup=70_000)
# Everything else of a row in four settings; betas are cut to what a rule takes.
SETTINGS: dict[str, dict[str, Any]] = {
    "usual": {**COMMON, "lr": 1e-3, "betas": (0.9, 0.999, 0.9999)},
    "no averages": {**COMMON, "lr": 0.3, "betas": (0.0, 0.0, 0.0), "weight_decay": 0.0, "momentum": 0.0, "rho": 0.0,
                    "warmup_steps": 0, "p_sq": 0.0},
    "long averages": {**COMMON, "lr": 2e-5, "betas": (0.99, 0.9999, 0.99999), "weight_decay": 0.3, "momentum": 0.9999,
                      "momentum_decay": 0.0, "ratio_sq": math.nan, "r": 0.0, "mu": 1.0},
    "no rate": {**COMMON, "lr": 0.0, "betas": (0.5, 0.7, 0.9), "eps": 0.0, "weight_sum": 0.0, "lr_max": -1.0,
                "eta": 0.0, "mu_product": 0.0, "update_sq": 0.0},
}


def cases() -> list[tuple[Rule, Mapping[str, Any]]]:
    """Every rule with every choice of its options, each computation once."""
    made = {}
    for rule in ALL:
        for chosen in choices(rule):
            graph = trace_scalars(rule, chosen)
            made.setdefault((emit_scalars.digest(graph), rule.coefficients), (rule, chosen))
    return list(made.values())


CASES = cases()
IDS = ["-".join([rule.name, *(f"{name}={value}" for name, value in chosen.items()
                              if value is None or isinstance(value, bool))]) for rule, chosen in CASES]


def setting(rule: Rule, chosen: Mapping[str, Any], name: str, step: int = 1) -> dict[str, Any]:
    """The hyperparameters of a rule in one of `SETTINGS`, with the options chosen."""
    values = dict(SETTINGS[name], k=step - 1)  # schedule-free optimizers count for themselves
    for key, kind in chosen.items():
        if kind is None or isinstance(kind, bool):
            values[key] = kind
        elif isinstance(kind, tuple):
            values[key] = values[key][: len(kind)]
    return {key: values[key] for key in chosen}


def words_of(rule: Rule, chosen: Mapping[str, Any], name: str, steps: np.ndarray) -> np.ndarray:
    """The words of one row for each step, made at once."""
    values = setting(rule, chosen, name)
    graph = trace_scalars(rule, values)
    block = np.repeat(prologue.words(graph, [Row(values)], CPU), len(steps), 0)
    for place, each in enumerate(graph.names):
        if each in ("step", "k"):
            counted = steps if each == "step" else steps - 1
            block[:, 3 * (len(FIXED) + place) + 2] = counted.astype(np.float64).view(np.int64)
    return block


# In float64, twice what was measured. Real powers (and 0.5, a square root on the device) differ from the C library's
# in the last place, and what is subtracted from 1 afterwards shows it larger: with a beta3 of 0.9999 one unit of it is
# 2^13 units of 1 - beta3.
ULPS = {"Adan": 4, "AdEMAMix": 1 << 14, "AdEMAMixWithoutFast": 1 << 14, "NAdam": 16, "ScheduleFreeAdamW": 512,
        "ScheduleFreeSGD": 512}


def check_steps(rule: Rule, chosen: Mapping[str, Any], name: str, steps: np.ndarray) -> float:
    """Compare with the host: every fp32 coefficient the same. Returns the largest difference in fp64, in ULP."""
    graph, words = trace_scalars(rule, chosen), words_of(rule, chosen, name, steps)
    values = setting(rule, chosen, name)
    wanted = np.array([[1.0, *on_host(rule, dict(values, k=step - 1) if "k" in values else values, step)]
                       for step in steps.tolist()])
    narrow = compiled(graph, words, False)[0]
    assert_same_bits(narrow, torch.from_numpy(wanted).float(), f"{rule.name}, {name}")
    wide = compiled(graph, words, True)[0].numpy()
    with np.errstate(invalid="ignore"):
        apart = np.abs(wide - wanted) / np.spacing(np.abs(wanted))
    assert (np.isfinite(wide) == np.isfinite(wanted)).all()
    return float(np.nanmax(np.where(wide == wanted, 0.0, apart), initial=0.0))


@needs_native
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("rule, chosen", CASES, ids=IDS)
def test_the_device_has_the_coefficients_of_the_host(rule, chosen, name):
    assert check_steps(rule, chosen, name, np.array(SAMPLE)) <= ULPS.get(rule.name, 2)


STEPPING = [(rule, chosen) for rule, chosen in CASES if reads_step(rule) or "k" in rule.hyperparameters]
QUICK = {rule.coefficients: chosen for rule, chosen in STEPPING}
NAMED = [(rule, chosen, name) for rule, chosen in STEPPING for name in SETTINGS]
NAMES = [f"{IDS[CASES.index((rule, chosen))]}-{name}" for rule, chosen, name in NAMED]
ENDS = [1000, 50_000, 70_000]  # of warmups
MANY = sorted({*SAMPLE, *range(1, 1001), *range(1, LAST, 61), *(end + d for end in ENDS for d in (-1, 0, 1, 2))})


@needs_native
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("rule", {rule.coefficients: rule for rule, _ in STEPPING}.values(), ids=lambda rule: rule.name)
def test_at_many_steps_to_100_000(rule, name):
    """Each function once, with all of its options."""
    assert check_steps(rule, QUICK[rule.coefficients], name, np.array(MANY)) <= ULPS.get(rule.name, 2)


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("rule, chosen, name", NAMED, ids=NAMES)
def test_at_every_step_to_100_000(rule, chosen, name):
    assert check_steps(rule, chosen, name, np.arange(1, LAST + 1)) <= ULPS.get(rule.name, 2)


@needs_native
@pytest.mark.parametrize("rule, chosen", CASES, ids=IDS)
def test_triton_has_the_bits_of_cpp(rule, chosen):
    """In float64, of which float32 is one rounding: all settings in one launch."""
    graph = trace_scalars(rule, chosen)
    words = np.concatenate([words_of(rule, chosen, name, np.array(SAMPLE)) for name in SETTINGS])
    assert_same_bits(interpreted(graph, words, True)[0], compiled(graph, words, True)[0], rule.name)


def test_triton_rounds_once():
    rule, chosen = CASES[0]
    graph, words = trace_scalars(rule, chosen), words_of(rule, chosen, "usual", np.array(SAMPLE))
    assert_same_bits(interpreted(graph, words, False)[0], interpreted(graph, words, True)[0].float())


# --- Programs ---------------------------------------------------------------------------------------------------------

def test_programs_use_few_slots():
    """Of every rule: an operation's numbers are those that something still reads."""
    assert max(program(trace_scalars(rule, chosen)).slots for rule, chosen in CASES) <= 32


def test_a_program_that_is_too_long_is_refused():
    graph = trace_scalars(ADAMW, GROUP)
    wide = ScalarGraph("rule Own")
    wide.outputs = {str(i): wide.scalar(float(i)) for i in range(program(graph).slots + (1 << 14))}
    with pytest.raises(ValueError, match=r"rule Own: 0 numbers, \d+ coefficients and 1 at a time"):
        program(wide)


def test_names_of_places_are_those_of_the_source():
    source = (ROOT / "csrc/cuda/prologue.cuh").read_text()
    camel = ["k" + "".join(part.capitalize() for part in name.split("_")) for name in FIXED]
    assert f"enum Fixed {{ {', '.join(camel)}, kFixed }};" in source
    inside = source.split("enum Operation : u32 {")[1].split("}")[0]
    camel = ["k" + "".join(part.capitalize() for part in name.split("_")) for name in OPERATIONS]
    assert [name.strip() for name in inside.split(",")] == camel
