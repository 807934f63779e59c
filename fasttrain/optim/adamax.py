"""Adamax: Kingma and Ba (arXiv 1412.6980, algorithm 2), in torch's form: epsilon is added inside the maximum."""

from __future__ import annotations

import torch

from fasttrain.optim.made_by_torch import MadeByTorch
from fasttrain.rule import Rule, maximum


def coefficients(step, lr, betas, eps, weight_decay):
    b1, b2 = betas
    return dict(decay=weight_decay, b1=b1, a1=1 - b1, b2=b2, eps=eps, rate=lr / (1 - b1**step))


def element(p, g, exp_avg, exp_inf, k):
    g = g + k.decay * p
    exp_avg = k.b1 * exp_avg + k.a1 * g
    exp_inf = maximum(k.b2 * exp_inf, abs(g) + k.eps)
    return p - k.rate * (exp_avg / exp_inf), exp_avg, exp_inf


STATE = ("exp_avg", "exp_inf")
RULE = Rule("Adamax", STATE, coefficients, element, positive=("exp_inf",), retain={"exp_avg": "b1", "exp_inf": "b2"})


class Adamax(MadeByTorch, torch.optim.Adamax):
    r"""Adam with the largest instead of the mean square: `torch.optim.Adamax`, its arguments, states and numbers.

    .. math::
        g_t \leftarrow g_t + \lambda\theta_{t-1}, \quad
        m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \quad u_t = \max(\beta_2 u_{t-1}, |g_t| + \epsilon), \quad
        \theta_t = \theta_{t-1} - \frac{\eta}{1-\beta_1^t}\, \frac{m_t}{u_t}

    Arguments:
        params: parameters, named parameters, or parameter groups, as in `torch.optim.Optimizer`; float64, float32,
            bfloat16 or float16 of any shape, or complex. Gradients may have another real dtype than their parameter.
        lr: learning rate :math:`\eta`, a float or a 0-dim tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon`.
        weight_decay: :math:`\lambda`, added to the gradient.
        maximize: ascend instead of descend.
        capturable: GPUs drive every step, which CUDA graphs can then hold (docs/graphs.md); `step` is on the GPU.
        foreach: accepted for torch's sake; every step here is fused.
        differentiable: run the reference backend and record it for autograd.
        backend: a name from `fasttrain.kernels.dispatch`, or None to choose.

    State: `step`, `exp_avg` and `exp_inf`, as torch keeps them.

    Raises:
        ValueError: a hyperparameter is out of its range (torch's own texts).

    Example:
        >>> import torch
        >>> from fasttrain.optim import Adamax
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = Adamax([weight], lr=0.1)
        >>> weight.grad = torch.tensor([3.0, -0.5])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000, 1.1000])

    Reference: arXiv 1412.6980, algorithm 2.
    """

    rules = (RULE,)

    def __init__(self, params, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, foreach=None, *,
                 maximize=False, differentiable=False, capturable=False, **options):
        self._take(options)
        torch.optim.Adamax.__init__(
            self, params, lr, betas, eps, weight_decay, foreach, maximize=maximize, differentiable=differentiable,
            capturable=capturable)
