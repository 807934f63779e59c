"""Schedules: pure functions of the step. They return the share of the highest learning rate, and keep no state."""

import math


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    r"""Rise in a line, then fall to zero along half a cosine.

    .. math::  s(t) = (t+1)/w \ \text{for } t < w, \qquad
               s(t) = \tfrac12 (1 + \cos \pi \tfrac{t - w}{n - w}) \ \text{for } w \le t < n

    Args:
        step: t, counted from 0.
        steps: n, of the whole run.
        warmup: w; a warmup longer than the run is a rise that does not end.

    Example:
        >>> [round(warmup_cosine(t, steps=6, warmup=2), 2) for t in range(6)]
        [0.5, 1.0, 1.0, 0.85, 0.5, 0.15]
    """
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2
