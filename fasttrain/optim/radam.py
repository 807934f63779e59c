"""RAdam: Liu et al., On the Variance of the Adaptive Learning Rate and Beyond (arXiv 1908.03265, algorithm 2)."""

from __future__ import annotations

import torch

from fasttrain.optim.made_by_torch import MadeByTorch
from fasttrain.rule import Rule, sqrt, where


def coefficients(step, lr, betas, eps, weight_decay, decoupled_weight_decay):
    b1, b2 = betas
    correction = 1 - b2**step
    longest = 2 / (1 - b2) - 1
    length = longest - 2 * step * b2**step / correction
    plain, rate = lr / (1 - b1**step), 0.0
    if length > 5.0:
        rectified = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        plain, rate = 0.0, plain * (rectified * correction) ** 0.5
    keep, decay = (1 - lr * weight_decay, 0.0) if decoupled_weight_decay else (1.0, weight_decay)
    return dict(decay=decay, keep=keep, b1=b1, a1=1 - b1, b2=b2, a2=1 - b2, eps=eps, plain=plain, rate=rate)


def element(p, g, exp_avg, exp_avg_sq, k):
    g = g + k.decay * p
    exp_avg, exp_avg_sq = k.b1 * exp_avg + k.a1 * g, k.b2 * exp_avg_sq + k.a2 * g * g
    # In the first steps, where the second moment says too little, the root is left out.
    update = where(k.rate > 0.0, k.rate * (exp_avg / (sqrt(exp_avg_sq) + k.eps)), k.plain * exp_avg)
    return k.keep * p - update, exp_avg, exp_avg_sq


RULE = Rule("RAdam", ("exp_avg", "exp_avg_sq"), coefficients, element, positive=("exp_avg_sq",),
            retain={"exp_avg": "b1", "exp_avg_sq": "b2"})


class RAdam(MadeByTorch, torch.optim.RAdam):
    r"""Adam that adapts once its second moment can be trusted: `torch.optim.RAdam`, its arguments, states and numbers.

    .. math::
        m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \quad v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t^2, \quad
        \rho_\infty = \tfrac{2}{1-\beta_2} - 1, \quad \rho_t = \rho_\infty - \tfrac{2 t \beta_2^t}{1 - \beta_2^t}, \quad
        \theta_t = \theta_{t-1} - \eta\, \frac{m_t}{1-\beta_1^t} \begin{cases}
            \sqrt{\frac{(\rho_t-4)(\rho_t-2)\rho_\infty}{(\rho_\infty-4)(\rho_\infty-2)\rho_t}}
                \frac{\sqrt{1-\beta_2^t}}{\sqrt{v_t} + \epsilon} & \rho_t > 5 \\ 1 & \text{else} \end{cases}

    Arguments:
        params: parameters, named parameters, or parameter groups, as in `torch.optim.Optimizer`; float64, float32,
            bfloat16 or float16 of any shape, or complex. Gradients may have another real dtype than their parameter.
        lr: learning rate :math:`\eta`, a float or a 0-dim tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon`, added to the root of the second moment before its bias is corrected.
        weight_decay: :math:`\lambda`, added to the gradient first.
        decoupled_weight_decay: let the parameter shrink by :math:`1 - \eta\lambda` instead.
        maximize: ascend instead of descend.
        capturable: GPUs drive every step, which CUDA graphs can then hold (docs/graphs.md); `step` is on the GPU.
        foreach: accepted for torch's sake; every step here is fused.
        differentiable: run the reference backend and record it for autograd.
        backend: a name from `fasttrain.kernels.dispatch`, or None to choose.

    State: `step`, `exp_avg` and `exp_avg_sq`, as torch keeps them.

    Raises:
        ValueError: a hyperparameter is out of its range (torch's own texts).

    Example:
        >>> import torch
        >>> from fasttrain.optim import RAdam
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = RAdam([weight], lr=0.1)
        >>> weight.grad = torch.tensor([3.0, -0.5])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.7000, 1.0500])

    Reference: arXiv 1908.03265, algorithm 2.
    """

    rules = (RULE,)

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, decoupled_weight_decay=False, *,
                 foreach=None, maximize=False, capturable=False, differentiable=False, **options):
        self._take(options)
        torch.optim.RAdam.__init__(
            self, params, lr, betas, eps, weight_decay, decoupled_weight_decay, foreach=foreach, maximize=maximize,
            capturable=capturable, differentiable=differentiable)
