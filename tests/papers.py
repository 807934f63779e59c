"""Algorithms of papers, retold from their text in plain float64 torch: they share no code with the package.

Each is a function of the problem: it takes the start, and a function from a point and a step to its gradient, and
returns the points of the trajectory. Nothing is fused, reordered or kept in another form than the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Gradient = Callable[[Tensor, int], Tensor]


def adan(theta: Tensor, gradient: Gradient, steps: int, eta: float, beta: tuple[float, float, float], eps: float,
         weight_decay: float, proximal: bool) -> list[Tensor]:
    """arXiv 2208.06677, algorithm 1 without restart. `beta` are the paper's: small. With the bias corrections that the
    authors' code has and the paper leaves out; without `proximal`, decay as in AdamW.
    """
    beta1, beta2, beta3 = beta
    m = v = n = previous = torch.zeros_like(theta)
    points = []
    for k in range(1, steps + 1):
        g = gradient(theta, k)
        difference = g - previous if k > 1 else torch.zeros_like(g)
        m = (1 - beta1) * m + beta1 * g
        v = (1 - beta2) * v + beta2 * difference
        n = (1 - beta3) * n + beta3 * (g + (1 - beta2) * difference) ** 2
        m_hat, v_hat, n_hat = (x / (1 - (1 - b) ** k) for x, b in ((m, beta1), (v, beta2), (n, beta3)))
        rate = eta / (n_hat.sqrt() + eps)
        moved = rate * (m_hat + (1 - beta2) * v_hat)
        theta = (theta - moved) / (1 + weight_decay * eta) if proximal else (1 - weight_decay * eta) * theta - moved
        previous = g
        points.append(theta)
    return points


def ademamix(theta: Tensor, gradient: Gradient, steps: int, eta: float, betas: tuple[float, float, float], alpha: float,
             warmup_alpha: int | None, warmup_beta3: int | None, eps: float, weight_decay: float) -> list[Tensor]:
    """arXiv 2409.03137, algorithm 1; schedulers: its equations for alpha and for beta3, linear in the half-life."""
    beta1, beta2, beta3_end = betas
    m1 = m2 = nu = torch.zeros_like(theta)
    points = []
    for t in range(1, steps + 1):
        alpha_t = alpha if warmup_alpha is None else min(t * alpha / warmup_alpha, alpha)
        if warmup_beta3 is None:
            beta3 = beta3_end
        else:
            start, end, mu = math.log(beta1 or 1e-300), math.log(beta3_end), min(t / warmup_beta3, 1)
            beta3 = min(math.exp(start * end / ((1 - mu) * end + mu * start)), beta3_end)
            if beta1 == 0:  # the limit, in which the half-life grows from 0
                beta3 = math.exp(end / mu)
        g = gradient(theta, t)
        m1 = beta1 * m1 + (1 - beta1) * g
        m2 = beta3 * m2 + (1 - beta3) * g
        nu = beta2 * nu + (1 - beta2) * g**2
        m1_hat, nu_hat = m1 / (1 - beta1**t), nu / (1 - beta2**t)
        theta = theta - eta * ((m1_hat + alpha_t * m2) / (nu_hat.sqrt() + eps) + weight_decay * theta)
        points.append(theta)
    return points


def schedule_free(start: Tensor, gradient: Gradient, steps: int, gamma: float, beta: float, weight_decay: float,
                  warmup: int, r: float, power: float,
                  beta2: float | None = None, eps: float = 0.0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """arXiv 2405.15682, equations 3 to 5, and with `beta2` algorithm 1 (AdamW): returns (x, y, z) after each step.

    The average's weights are t^r times a power of the largest rate so far, the square in the paper.
    """
    x = z = start
    v = torch.zeros_like(start)
    total = largest = 0.0
    points = []
    for t in range(1, steps + 1):
        y = (1 - beta) * z + beta * x
        g = gradient(y, t)
        rate = gamma * min(1.0, t / warmup) if warmup else gamma
        direction = g
        if beta2 is not None:
            v = beta2 * v + (1 - beta2) * g**2
            rate = rate * math.sqrt(1 - beta2**t)
            direction = g / (v.sqrt() + eps)
        z = z - rate * direction - rate * weight_decay * y
        largest = max(largest, rate)
        weight = t**r * largest**power
        total += weight
        c = weight / total
        x = (1 - c) * x + c * z
        points.append((x, (1 - beta) * z + beta * x, z))
    return points
