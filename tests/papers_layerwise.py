"""LAMB, LARS and StableAdamW, retold line by line from their papers: witnesses that share nothing with the package.

Each is a function of one step in float64, with plain tensors and a dict that it keeps: ``(w, g, state, **options)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def lamb(x: Tensor, g: Tensor, state: dict[str, Any], *, lr: float, betas: tuple[float, float], eps: float,
         weight_decay: float, bias_correction: bool = True, clamp: tuple[float, float] = (0.0, float("inf")),
         always_adapt: bool = True) -> Tensor:
    """arXiv 1904.00962, algorithm 2."""
    beta1, beta2 = betas
    t = state["t"] = state.get("t", 0) + 1
    m = state["m"] = beta1 * state.get("m", torch.zeros_like(x)) + (1 - beta1) * g
    v = state["v"] = beta2 * state.get("v", torch.zeros_like(x)) + (1 - beta2) * g**2
    m_hat, v_hat = (m / (1 - beta1**t), v / (1 - beta2**t)) if bias_correction else (m, v)
    r = m_hat / (torch.sqrt(v_hat) + eps)
    step = r + weight_decay * x
    phi = min(max(torch.linalg.vector_norm(x).item(), clamp[0]), clamp[1])
    length = torch.linalg.vector_norm(step).item()
    ratio = phi / length if phi > 0 and length > 0 else 1.0
    if not always_adapt and weight_decay == 0:
        ratio = 1.0
    return x - lr * ratio * step


def lars(w: Tensor, g: Tensor, state: dict[str, Any], *, lr: float, momentum: float, weight_decay: float,
         trust_coefficient: float, eps: float, nesterov: bool = False, adapt: bool = True) -> Tensor:
    """arXiv 1708.03888, algorithm 1; eps, Nesterov's form and parameters left out are usual additions."""
    norm_w, norm_g = (torch.linalg.vector_norm(tensor).item() for tensor in (w, g))
    local = trust_coefficient * norm_w / (norm_g + weight_decay * norm_w + eps) if norm_w > 0 and norm_g > 0 else 1.0
    if not adapt:
        local = 1.0
    move = lr * local * (g + weight_decay * w)
    v = state["v"] = momentum * state.get("v", torch.zeros_like(w)) + move
    return w - (move + momentum * v if nesterov else v)


def stable_adamw(theta: Tensor, g: Tensor, state: dict[str, Any], *, lr: float, betas: tuple[float, float], eps: float,
                 weight_decay: float) -> Tensor:
    """arXiv 2304.13013, algorithm 2; its u is torch's exp_avg_sq."""
    beta1, beta2 = betas
    t = state["t"] = state.get("t", 0) + 1
    beta1_hat = beta1 * (1 - beta1 ** (t - 1)) / (1 - beta1**t)
    beta2_hat = beta2 * (1 - beta2 ** (t - 1)) / (1 - beta2**t)
    v = state["v"] = beta1_hat * state.get("v", torch.zeros_like(theta)) + (1 - beta1_hat) * g
    u = state["u"] = beta2_hat * state.get("u", torch.zeros_like(theta)) + (1 - beta2_hat) * g**2
    rms = torch.sqrt(torch.mean(g**2 / torch.clamp(u, min=eps**2))).item() if g.numel() else 0.0
    eta = lr / max(1.0, rms)
    return theta - eta * weight_decay * theta - eta * v / (torch.sqrt(u) + eps)
