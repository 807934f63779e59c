"""What the tests of cross-entropy share: an independent witness in float64, and the bounds of docs/losses.md."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from helpers import ulp
from torch import Tensor

from fasttrain.kernels import cross_entropy as kernel
from fasttrain.kernels.cross_entropy import Terms

LOSS = 2.0**-20  # of a row's loss, beside one rounding to float32: worst case of the order of sums and of exp
GRAD = 2.0**-20  # of a row's derivative, in units of its scale, beside one rounding to the dtype of the logits


class Numbers(NamedTuple):
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    ignore_index: int = -100


class Exact(NamedTuple):
    losses: Tensor
    grads: Tensor
    unit: Tensor


def exact(logits: Tensor, targets: Tensor, numbers: Numbers, scales: Tensor) -> Exact:
    """By torch's own definitions: losses of rows, the derivative of the sum of ``scales * losses``, its terms' size."""
    x = logits.detach().double().requires_grad_()
    rows, flat = x.reshape(-1, x.shape[-1]), targets.reshape(-1).long()
    losses = F.cross_entropy(rows, flat, ignore_index=numbers.ignore_index, label_smoothing=numbers.label_smoothing,
                             reduction="none")
    counted = flat != numbers.ignore_index
    z = torch.where(counted, numbers.z_loss * rows.logsumexp(1).square(), 0) if numbers.z_loss else 0
    (grads,) = torch.autograd.grad(((losses + z) * scales.double().reshape(-1)).sum(), x)
    lse = rows.detach().logsumexp(1)
    unit = scales.double().abs().reshape(-1) * (1 + 2 * numbers.z_loss * lse.abs())
    return Exact((losses + z).detach().reshape(targets.shape), grads, unit.expand(len(rows)).reshape(targets.shape))


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: float = 4.0, offset: float = 0.0,
         ignored: float = 0.2, index: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    """Random logits, and targets some of which are ignored (none of unsigned ones)."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale + offset).to(dtype)
    targets = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    if index != torch.uint8:
        targets[torch.rand(shape[:-1], generator=generator) < ignored] = -100
    return logits, targets.to(index)


def measured(logits: Tensor, targets: Tensor, numbers: Numbers, scales: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """What a backend gives: losses of rows with their z terms, and the derivative, into poisoned memory."""
    terms = Terms(0, logits.shape[-1], numbers.ignore_index, *numbers[:2])
    found = kernel.measure(logits, targets, terms, backend)
    out = torch.full(logits.shape, torch.nan, dtype=logits.dtype)
    kernel.differentiate(logits, targets, terms, found.parts, scales, out, backend)
    return (found.losses + found.z).reshape(targets.shape), out


def check_losses(got: Tensor, wanted: Tensor, what: Any = "") -> None:
    """Of rows, within the bounds."""
    assert got.dtype == torch.float32, what
    error = (got.double() - wanted).abs() - wanted.abs() * 2.0**-23
    assert error.numel() == 0 or error.max() <= LOSS, f"{what}: off by {error.max().item() / LOSS:.2f} of the bound"


def check_grads(got: Tensor, wanted: Exact, what: Any = "", more: float = 0.0) -> None:
    """By logits, within the bounds; `more`: roundings to the dtype beyond one half."""
    allowed = wanted.unit[..., None] * GRAD + (0.5 + more) * ulp(wanted.grads, got.dtype)
    over = (got.double() - wanted.grads).abs() / allowed.clamp_min(1e-300)
    assert got.numel() == 0 or over.max() <= 1, f"{what}: off by {over.max().item():.2f} of the bound"


def check(logits: Tensor, targets: Tensor, numbers: Numbers, backend: str, what: Any = "") -> None:
    """Losses and derivatives of a backend against the witness, with scales of rows and with one for all."""
    for scales in (torch.linspace(-1.0, 2.0, targets.numel()), torch.tensor([0.37])):
        wanted = exact(logits, targets, numbers, scales)
        losses, grads = measured(logits, targets, numbers, scales, backend)
        check_losses(losses, wanted.losses, what)
        check_grads(grads, wanted, what)
