"""LAMB: You et al., Large Batch Optimization for Deep Learning (arXiv 1904.00962, algorithm 2)."""

from __future__ import annotations

import numpy as np

from fasttrain.optim.adamw import moments
from fasttrain.optim.checks import check_hyperparameters
from fasttrain.optim.two_stage import TwoStage
from fasttrain.rule import Rule, sqrt


def corrected(step, betas, eps, bias_correction):
    """m / c1 / (sqrt(v) / root + eps) is correct m / (sqrt(v) + root eps)."""
    b1, b2 = betas
    root = (1 - b2**step) ** 0.5 if bias_correction else 1.0
    return dict(correct=root / (1 - b1**step) if bias_correction else 1.0, eps=eps * root)


def coefficients(step, betas, eps, weight_decay, bias_correction):
    b1, b2 = betas
    return dict(b1=b1, a1=1 - b1, b2=b2, a2=1 - b2, decay=weight_decay, **corrected(step, betas, eps, bias_correction))


def direction(p, exp_avg, exp_avg_sq, k):
    return k.correct * (exp_avg / (sqrt(exp_avg_sq) + k.eps)) + k.decay * p


def measure(p, g, exp_avg, exp_avg_sq, k):
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, k)
    update = direction(p, exp_avg, exp_avg_sq, k)
    return p, exp_avg, exp_avg_sq, p * p, update * update


def trust(step, lr, betas, eps, weight_decay, bias_correction, clamp, always_adapt, p_sq, update_sq):
    low, high = clamp
    size, length = np.clip(np.sqrt(p_sq), low, high), np.sqrt(update_sq)
    ratio = np.where((size > 0) & (length > 0), size / length, 1.0)
    adapts = always_adapt or weight_decay != 0
    return dict(rate=lr * (ratio if adapts else 1.0), decay=weight_decay,
                **corrected(step, betas, eps, bias_correction))


def apply(p, exp_avg, exp_avg_sq, k):
    return p - k.rate * direction(p, exp_avg, exp_avg_sq, k), exp_avg_sq


MEASURE = Rule("LAMBMeasure", ("exp_avg", "exp_avg_sq"), coefficients, measure, ("exp_avg_sq",),
               {"exp_avg": "b1", "exp_avg_sq": "b2"}, sums=("p_sq", "update_sq"))
APPLY = Rule("LAMBApply", ("exp_avg_sq",), trust, apply, ("exp_avg_sq",), sums=())


class LAMB(TwoStage):
    r"""Adam's direction, scaled for each parameter by its norm over the direction's.

    .. math::
        r_t = \frac{m_t / (1-\beta_1^t)}{\sqrt{v_t / (1-\beta_2^t)} + \epsilon} + \lambda\theta_{t-1}, \quad
        \theta_t = \theta_{t-1} - \eta\, \frac{\phi(\|\theta_{t-1}\|)}{\|r_t\|}\, r_t, \quad
        \phi(z) = \min(\max(z, \gamma_l), \gamma_u)

    with m and v as in `Adam`. Where a norm is zero, the ratio is 1. Two walks: 24 and 16 bytes an element in fp32.

    Arguments:
        params: parameters, named parameters, or parameter groups, as in `torch.optim.Optimizer`; float64, float32,
            bfloat16 or float16 of any shape, or complex.
        lr: learning rate :math:`\eta`, a float or a 0-dim tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon`, added to the root of the second moment.
        weight_decay: :math:`\lambda`.
        bias_correction: divide the moments by :math:`1 - \beta^t`.
        clamp: :math:`(\gamma_l, \gamma_u)`, the least and the largest norm of a parameter that counts.
        always_adapt: scale parameters of groups without weight decay too, as the paper does; many implementations leave
            them (gains and biases) alone: False.
        maximize: ascend instead of descend.
        backend: a name from `fasttrain.kernels.dispatch`, or None to choose.

    State: `step`, `exp_avg`, `exp_avg_sq`; the moments are float32 for 16-bit parameters.

    Raises:
        ValueError: a hyperparameter is out of its range.

    Example:
        >>> import torch
        >>> from fasttrain.optim import LAMB
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = LAMB([weight], lr=0.1, weight_decay=0.0)
        >>> weight.grad = torch.tensor([3.0, -0.5])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000, 1.1000])

    Reference: arXiv 1904.00962, algorithm 2.
    """

    rules = (MEASURE, APPLY)
    counts_steps = True

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=1e-2, *, bias_correction=True,
                 clamp=(0.0, float("inf")), always_adapt=True, maximize=False, **options):
        check_hyperparameters(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        if not 0.0 <= clamp[0] <= clamp[1]:
            raise ValueError(f"Invalid clamp: {clamp}; it must be a least and a largest norm")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
                                      bias_correction=bias_correction, clamp=clamp, always_adapt=always_adapt,
                                      maximize=maximize), **options)

    def second_of(self, group):
        return APPLY

    def second_tensors(self, item):
        p, _, exp_avg, exp_avg_sq = item.tensors
        return p, exp_avg, exp_avg_sq
