"""SOAP for one tensor, retold from arXiv 2409.11321 (algorithm 3 and section 4) with Kronecker products: a witness.

Where a matrix has preconditioners L and R, vec(Q_L^T G Q_R) is (Q_L kron Q_R)^T vec(G): here one orthogonal matrix acts
on the flattened tensor. Only for small tensors, in float64.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np


def soap(x: np.ndarray, g: np.ndarray, state: dict[str, Any], *, shape: tuple[int, ...], dims: tuple[int, ...],
         lr: float, betas: tuple[float, float], shampoo_beta: float, eps: float, weight_decay: float,
         precondition_frequency: int, normalize_grads: bool, correct_bias: bool) -> np.ndarray:
    """The new x after one gradient g; `shape` is how it is preconditioned, `dims` which of its dimensions are."""
    b1, b2 = betas
    g = g.reshape(shape)
    if not state:
        state.update(t=0, m=np.zeros(g.size), v=np.zeros(g.size), L=[np.zeros((n, n)) for n in shape],
                     Q=[np.eye(n) for n in shape])
        gather(g, state["L"], shampoo_beta)
        return x  # Q is for the caller: eigenvectors of one gradient's L are not unique, and Adam depends on them
    state["t"] += 1
    t = state["t"]
    basis = reduce(np.kron, state["Q"], np.eye(1))
    rotated = basis.T @ g.reshape(-1)
    state["m"] = b1 * state["m"] + (1 - b1) * rotated
    state["v"] = b2 * state["v"] + (1 - b2) * rotated**2
    direction = basis @ (state["m"] / (np.sqrt(state["v"]) + eps))
    if normalize_grads:
        direction = direction / (1e-30 + np.sqrt(np.mean(direction**2)))
    rate = lr * (np.sqrt(1 - b2**t) / (1 - b1**t) if correct_bias else 1.0)
    x = x - rate * direction.reshape(x.shape)
    x = x - lr * weight_decay * x
    gather(g, state["L"], shampoo_beta)
    if t % precondition_frequency == 0:
        straight = basis @ state["m"]
        v = state["v"].reshape(shape)
        for dim in dims:
            gram, q = state["L"][dim], state["Q"][dim]
            order = np.argsort(-np.diag(q.T @ gram @ q), kind="stable")
            v = np.take(v, order, axis=dim)
            state["Q"][dim] = np.linalg.qr(gram @ q[:, order])[0]
        state["v"] = v.reshape(-1)
        state["m"] = reduce(np.kron, state["Q"], np.eye(1)).T @ straight
    return x


def gather(g: np.ndarray, grams: list[np.ndarray], beta: float) -> None:
    """Each preconditioner's running average of the gradient's unfolding times its transpose."""
    for dim, gram in enumerate(grams):
        unfolded = np.moveaxis(g, dim, 0).reshape(g.shape[dim], -1)
        gram[:] = beta * gram + (1 - beta) * unfolded @ unfolded.T
