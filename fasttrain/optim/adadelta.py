"""Adadelta: Zeiler (arXiv 1212.5701, algorithm 1), with torch's learning rate."""

from __future__ import annotations

import torch

from fasttrain.optim.made_by_torch import MadeByTorch
from fasttrain.rule import Rule, sqrt


def coefficients(step, lr, rho, eps, weight_decay):
    return dict(decay=weight_decay, rho=rho, part=1 - rho, eps=eps, lr=lr)


def element(p, g, square_avg, acc_delta, k):
    g = g + k.decay * p
    square_avg = k.rho * square_avg + k.part * g * g
    delta = sqrt((acc_delta + k.eps) / (square_avg + k.eps)) * g  # one root of the quotient of two
    return p - k.lr * delta, square_avg, k.rho * acc_delta + k.part * delta * delta


STATE = ("square_avg", "acc_delta")
RULE = Rule("Adadelta", STATE, coefficients, element, positive=STATE, retain=dict.fromkeys(STATE, "rho"))


class Adadelta(MadeByTorch, torch.optim.Adadelta):
    r"""Steps in units of their own running size: `torch.optim.Adadelta`, its arguments, its states and its numbers.

    .. math::
        g_t \leftarrow g_t + \lambda\theta_{t-1}, \quad
        v_t = \rho v_{t-1} + (1-\rho) g_t^2, \quad
        \Delta_t = \frac{\sqrt{u_{t-1} + \epsilon}}{\sqrt{v_t + \epsilon}}\, g_t, \quad
        u_t = \rho u_{t-1} + (1-\rho) \Delta_t^2, \quad
        \theta_t = \theta_{t-1} - \eta \Delta_t

    Arguments:
        params: parameters, named parameters, or parameter groups, as in `torch.optim.Optimizer`; float64, float32,
            bfloat16 or float16 of any shape, or complex. Gradients may have another real dtype than their parameter.
        lr: learning rate :math:`\eta`, a float or a 0-dim tensor; 1 in the paper.
        rho: :math:`\rho`, in [0, 1].
        eps: :math:`\epsilon`, inside both roots.
        weight_decay: :math:`\lambda`, added to the gradient.
        maximize: ascend instead of descend.
        capturable: GPUs drive every step, which CUDA graphs can then hold (docs/graphs.md); `step` is on the GPU.
        foreach: accepted for torch's sake; every step here is fused.
        differentiable: run the reference backend and record it for autograd.
        backend: a name from `fasttrain.kernels.dispatch`, or None to choose.

    State: `step`, `square_avg` and `acc_delta`, as torch keeps them.

    Raises:
        ValueError: a hyperparameter is out of its range (torch's own texts).

    Example:
        >>> import torch
        >>> from fasttrain.optim import Adadelta
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = Adadelta([weight], lr=100.0)
        >>> weight.grad = torch.tensor([3.0, -0.5])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.6838, 1.3162])

    Reference: arXiv 1212.5701, algorithm 1.
    """

    rules = (RULE,)

    def __init__(self, params, lr=1.0, rho=0.9, eps=1e-6, weight_decay=0, foreach=None, *, capturable=False,
                 maximize=False, differentiable=False, **options):
        self._take(options)
        torch.optim.Adadelta.__init__(
            self, params, lr, rho, eps, weight_decay, foreach, capturable=capturable, maximize=maximize,
            differentiable=differentiable)
