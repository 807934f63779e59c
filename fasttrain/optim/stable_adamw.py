"""StableAdamW: Wortsman et al., Stable and low-precision training (arXiv 2304.13013, algorithm 2)."""

from __future__ import annotations

import numpy as np

from fasttrain.optim.adamw import moments
from fasttrain.optim.checks import check_hyperparameters
from fasttrain.optim.two_stage import TwoStage
from fasttrain.rule import Rule, maximum, sqrt


def coefficients(step, betas, eps):
    b1, b2 = ((beta - beta**step) / (1 - beta**step) for beta in betas)  # instead of a correction of the bias
    return dict(b1=b1, a1=1 - b1, b2=b2, a2=1 - b2, least=eps * eps)


def measure(p, g, exp_avg, exp_avg_sq, k):
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, k)
    # The quotient of two squares, so divided before it is multiplied: neither overflows before the other.
    return p, exp_avg, exp_avg_sq, g / maximum(exp_avg_sq, k.least) * g


def clipped(step, lr, eps, weight_decay, ratio_sq, elements):
    rms = np.sqrt(ratio_sq / elements)
    rate = lr / np.fmax(1.0, rms)
    return dict(rate=rate, keep=1 - rate * weight_decay, eps=eps)


def apply(p, exp_avg, exp_avg_sq, k):
    return k.keep * p - k.rate * (exp_avg / (sqrt(exp_avg_sq) + k.eps)), exp_avg_sq


MEASURE = Rule("StableAdamWMeasure", ("exp_avg", "exp_avg_sq"), coefficients, measure, ("exp_avg_sq",),
               {"exp_avg": "b1", "exp_avg_sq": "b2"}, sums=("ratio_sq",))
APPLY = Rule("StableAdamWApply", ("exp_avg_sq",), clipped, apply, ("exp_avg_sq",), sums=())


class StableAdamW(TwoStage):
    r"""AdamW whose rate is divided, for each parameter, by how far its second moment lags behind the gradient.

    .. math::
        \hat\beta_i = \beta_i \frac{1 - \beta_i^{t-1}}{1 - \beta_i^t}, \quad
        m_t = \hat\beta_1 m_{t-1} + (1-\hat\beta_1) g_t, \quad v_t = \hat\beta_2 v_{t-1} + (1-\hat\beta_2) g_t^2

    .. math::
        \mathrm{RMS}_t = \sqrt{\mathrm{mean}\bigl(g_t^2 / \max(v_t, \epsilon^2)\bigr)}, \quad
        \eta_t = \eta / \max(1, \mathrm{RMS}_t), \quad
        \theta_t = (1 - \eta_t\lambda)\,\theta_{t-1} - \eta_t \frac{m_t}{\sqrt{v_t} + \epsilon}

    Two walks: 24 and 16 bytes an element in fp32.

    Arguments:
        params: parameters, named parameters, or parameter groups, as in `torch.optim.Optimizer`; float64, float32,
            bfloat16 or float16 of any shape, or complex.
        lr: learning rate :math:`\eta`, a float or a 0-dim tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon`.
        weight_decay: :math:`\lambda`.
        maximize: ascend instead of descend.
        backend: a name from `fasttrain.kernels.dispatch`, or None to choose.

    State: `step`, `exp_avg`, `exp_avg_sq`; the moments are without bias, not as `AdamW` keeps them, and
        float32 for 16-bit parameters.

    Raises:
        ValueError: a hyperparameter is out of its range.

    Example:
        >>> import torch
        >>> from fasttrain.optim import StableAdamW
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = StableAdamW([weight], lr=0.1, weight_decay=0.0)
        >>> weight.grad = torch.tensor([3.0, -0.5])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000, 1.1000])

    Reference: arXiv 2304.13013, algorithm 2.
    """

    rules = (MEASURE, APPLY)
    counts_steps = True

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), eps=1e-6, weight_decay=1e-2, *, maximize=False, **options):
        check_hyperparameters(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize),
                         **options)

    def second_of(self, group):
        return APPLY

    def second_tensors(self, item):
        p, _, exp_avg, exp_avg_sq = item.tensors
        return p, exp_avg, exp_avg_sq
