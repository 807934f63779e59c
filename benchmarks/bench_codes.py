"""What the codes of states cost: their error on the moments of the main job after 300 steps, beside other codes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import main_job
from fasttrain.precision.codecs import NUMBER, POSITIVE, array_shapes, code_dtype, codec, decode, encode
from fasttrain.train import text
from fasttrain.train.config import TrainConfig

Coder = Callable[[Tensor], Tensor]  # values of one tensor, flat -> what is read back
Moments = list[tuple[Tensor, Tensor]]  # exp_avg and exp_avg_sq of each tensor
EPS = 1e-8
SMALLEST = 4096  # elements: tensors with fewer keep fp32 states


# --- The codes of the package -----------------------------------------------------------------------------------------

def ours(number: int, values: Tensor) -> Tensor:
    """Through `fasttrain.precision.codecs`, rounded to nearest."""
    main_shape, extra_shape = array_shapes(number, values.shape)
    main = torch.zeros(main_shape, dtype=code_dtype(number))
    extra = None if extra_shape is None else torch.zeros(extra_shape)
    encode(number, values, main, extra, None)
    return decode(number, main, extra, values.numel())


# --- Codes that were considered ---------------------------------------------------------------------------------------

def in_blocks(levels: Callable[[Tensor], Tensor], block: int, positive: bool, values: Tensor) -> Tensor:
    """Code magnitudes relative to the largest of their block; `levels` rounds numbers from 0 to 1 to the nearest code.

    A positive value that is not zero never becomes zero, as in the package.
    """
    padded = torch.nn.functional.pad(values, (0, -values.numel() % block)).view(-1, block)
    largest = padded.abs().amax(1, keepdim=True)
    coded = levels(torch.where(largest > 0, padded.abs() / largest, 0.0))
    if positive:
        tried = levels(2.0 ** torch.linspace(-40, 0, 4001))
        coded = torch.where((padded != 0) & (coded == 0), tried[tried > 0].min(), coded)
    return (coded * largest * padded.sign()).flatten()[: values.numel()]


def powers(top: int, exponent: int, share: Tensor) -> Tensor:
    """(c / top)^exponent, c from 0 to top: 1 is linear."""
    return (share ** (1 / exponent) * top + 0.5).floor().div(top) ** exponent


def floats(exponent_bits: int, mantissa_bits: int, share: Tensor) -> Tensor:
    """A small float without a sign whose largest number is 1: `exponent_bits` decide how far down it reaches."""
    top = 2 - 2.0**-mantissa_bits
    step = 2.0 ** (torch.floor(torch.log2((share * top).clamp(min=1e-30)))
                   .clamp(min=2 - 2**exponent_bits, max=0) - mantissa_bits)
    return (share * top / step).round() * step / top


SIGNED = {  # bits, levels
    "linear": (8, partial(powers, 127, 1)), "E3M4": (8, partial(floats, 3, 4)),
    "linear, 4 bits": (4, partial(powers, 7, 1)), "E2M1": (4, partial(floats, 2, 1))}
UNSIGNED = {
    "linear": (8, partial(powers, 255, 1)), "squares": (8, partial(powers, 255, 2)),
    "fourth powers": (8, partial(powers, 255, 4)), "E4M4": (8, partial(floats, 4, 4)),
    "linear, 4 bits": (4, partial(powers, 15, 1)), "fourth powers, 4 bits": (4, partial(powers, 15, 4)),
    "E3M1": (4, partial(floats, 3, 1))}
NAMES = ("bf16", "int8", "e4m3", "e5m2", "int4")


def as_is(values: Tensor) -> Tensor:
    """No code."""
    return values


def coders() -> Iterable[tuple[str, str, bool, Coder, Coder]]:
    """(state, code, whether it is the package's, coder of exp_avg, coder of exp_avg_sq)."""
    for name in NAMES:
        number = NUMBER[name]
        first, second = partial(ours, number), partial(ours, number | (POSITIVE if codec(number).block else 0))
        yield "exp_avg", name, True, first, as_is
        yield "exp_avg_sq", name, True, as_is, second
        yield "both", name, True, first, second
    for name, (bits, levels) in SIGNED.items():
        yield "exp_avg", name, False, partial(in_blocks, levels, 256 if bits == 8 else 128, False), as_is
    for name, (bits, levels) in UNSIGNED.items():
        yield "exp_avg_sq", name, False, as_is, partial(in_blocks, levels, 256 if bits == 8 else 128, True)


# --- Their errors -----------------------------------------------------------------------------------------------------

def errors(moments: Moments, first: Coder, second: Coder) -> dict[str, float]:
    """Relative L2 errors over all tensors together: of the values (of the state that is coded), and of the update."""
    off = dict.fromkeys(("exp_avg", "exp_avg_sq", "update"), 0.0)
    whole = dict(off)
    for m, v in moments:
        m_, v_ = first(m), second(v)
        pairs = {"exp_avg": (m, m_), "exp_avg_sq": (v, v_), "update": (m / (v.sqrt() + EPS), m_ / (v_.sqrt() + EPS))}
        for name, (exact, read) in pairs.items():
            off[name] += (exact.double() - read.double()).square().sum().item()
            whole[name] += exact.double().square().sum().item()
    return {name: (off[name] / whole[name]) ** 0.5 for name in off}


def moments_of(model: torch.nn.Module, optimizer: Any) -> dict[str, Moments]:
    """The moments of the tensors that would be coded, by what they are."""
    kinds: dict[str, Moments] = {"matrices": [], "embeddings": []}
    for name, p in model.named_parameters():
        if p.numel() >= SMALLEST:
            state = optimizer.state[p]
            kinds["embeddings" if "embedding" in name else "matrices"].append(
                (state["exp_avg"].flatten(), state["exp_avg_sq"].flatten()))
    return kinds


def run(steps: int = 300, source: Path | None = None, **job: Any) -> dict[str, Any]:
    """Train with fp32 states, then code them; `source` is that of the text, as in `fasttrain.train.text.load`."""
    config = TrainConfig(processes=1, **job)
    read = text.load(source, config.held_out, config.sequence)
    model, optimizer = main_job.make(config, torch.float32, {})
    main_job.train(config, read, model, optimizer, steps)
    kinds = moments_of(model, optimizer)
    rows = []
    for state, code, own, first, second in coders():
        found = {kind: errors(moments, first, second) for kind, moments in kinds.items()}
        rows.append({"state": state, "code": code, "ours": own,
                     "value": {kind: error[state] for kind, error in found.items()} if state != "both" else None,
                     "update": {kind: error["update"] for kind, error in found.items()}})
    return {"job": {"steps": steps, **job}, "rows": rows,
            "elements": {kind: sum(m.numel() for m, _ in moments) for kind, moments in kinds.items()}}


def report(figures: dict[str, Any]) -> str:
    """The table of the figures."""
    lines = []
    for row in figures["rows"]:
        said = [f"{kind}: update {row['update'][kind]:7.2%}" +
                (f", value {row['value'][kind]:7.2%}" if row["value"] else "") for kind in figures["elements"]]
        lines.append(f"{row['state']:10} {row['code']:22} {'ours' if row['ours'] else '    '}  {'; '.join(said)}")
    return "\n".join(lines)
