"""What Muon takes a parameter for: matrices of some shape, and what that does to the learning rate."""

from __future__ import annotations

import math

from torch import Tensor


def adjustment(adjust_lr_fn: str | None, rows: int, columns: int) -> float:
    """What the learning rate is multiplied with: Jordan's ("original", None) or Moonlight's ("match_rms_adamw").

    >>> adjustment(None, 400, 100), adjustment("match_rms_adamw", 400, 100)
    (2.0, 4.0)
    """
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


def matrices(p: Tensor, group: dict) -> tuple[int, int, int]:
    """A parameter as (how many, rows, columns): its heads, its leading dimensions, or all of it flattened.

    >>> import torch
    >>> matrices(torch.empty(8, 3, 5, 5), dict(flatten=True, heads=1))
    (1, 8, 75)
    >>> matrices(torch.empty(4, 6, 5), dict(flatten=False, heads=1)), matrices(torch.empty(8, 6), dict(heads=4))
    ((4, 6, 5), (4, 2, 6))
    """
    if p.dim() == 2:
        return group["heads"], p.shape[0] // group["heads"], p.shape[1]
    if group["flatten"]:
        return 1, p.shape[0], math.prod(p.shape[1:])
    return math.prod(p.shape[:-2]), p.shape[-2], p.shape[-1]
