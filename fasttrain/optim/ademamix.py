"""AdEMAMix: Pagliardini, Ablin and Grangier, Better, Faster, Older (arXiv 2409.03137, algorithm 1)."""

from __future__ import annotations

from fasttrain.optim.checks import check_hyperparameters
from fasttrain.optim.optimizer import Optimizer
from fasttrain.rule import Rule, log, sqrt


def half_life(beta):
    return log(0.5) / log(beta) if beta > 0 else 0.0


def warm(step, betas, alpha, beta3_warmup, alpha_warmup):
    """The weight of the slow average, and its beta, at a step: both grow, the beta linearly in its half-life."""
    b1, _, b3 = betas
    if alpha_warmup is not None and step < alpha_warmup:
        alpha = alpha * step / alpha_warmup
    if beta3_warmup is not None and step < beta3_warmup and b3 > 0:
        share = step / beta3_warmup
        b3 = 0.5 ** (1 / ((1 - share) * half_life(b1) + share * half_life(b3)))
    return alpha, b3


def coefficients(step, lr, betas, alpha, beta3_warmup, alpha_warmup, eps, weight_decay):
    b1, b2, _ = betas
    alpha, b3 = warm(step, betas, alpha, beta3_warmup, alpha_warmup)
    root = (1 - b2**step) ** 0.5
    return dict(b1=b1, a1=1 - b1, b2=b2, a2=1 - b2, b3=b3, a3=1 - b3, eps=eps * root, keep=1 - lr * weight_decay,
                fast=lr * root / (1 - b1**step), slow=lr * root * alpha)


def element(p, g, exp_avg_fast, exp_avg_slow, exp_avg_sq, k):
    exp_avg_fast = k.b1 * exp_avg_fast + k.a1 * g
    exp_avg_slow, exp_avg_sq = k.b3 * exp_avg_slow + k.a3 * g, k.b2 * exp_avg_sq + k.a2 * g * g
    update = (k.fast * exp_avg_fast + k.slow * exp_avg_slow) / (sqrt(exp_avg_sq) + k.eps)
    return k.keep * p - update, exp_avg_fast, exp_avg_slow, exp_avg_sq


def without_fast(p, g, exp_avg_slow, exp_avg_sq, k):
    exp_avg_slow, exp_avg_sq = k.b3 * exp_avg_slow + k.a3 * g, k.b2 * exp_avg_sq + k.a2 * g * g
    update = (k.fast * g + k.slow * exp_avg_slow) / (sqrt(exp_avg_sq) + k.eps)
    return k.keep * p - update, exp_avg_slow, exp_avg_sq


SLOW = {"exp_avg_slow": "b3", "exp_avg_sq": "b2"}
BOTH = {"exp_avg_fast": "b1", **SLOW}
MIXED = Rule("AdEMAMix", tuple(BOTH), coefficients, element, ("exp_avg_sq",), BOTH)
WITHOUT_FAST = Rule("AdEMAMixWithoutFast", tuple(SLOW), coefficients, without_fast, ("exp_avg_sq",), SLOW)


class AdEMAMix(Optimizer):
    r"""AdamW with a second, much slower average of the gradients.

    .. math::
        m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \quad s_t = \beta_3(t) s_{t-1} + (1-\beta_3(t)) g_t, \quad
        v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t^2, \quad
        \theta_t = (1 - \eta\lambda)\theta_{t-1} -
            \eta\, \frac{m_t / (1-\beta_1^t) + \alpha(t) s_t}{\sqrt{v_t / (1-\beta_2^t)} + \epsilon}

    Arguments:
        params: parameters, named parameters, or parameter groups, as in `torch.optim.Optimizer`; float64, float32,
            bfloat16 or float16 of any shape, or complex. Gradients may have another real dtype than their parameter.
        lr: learning rate :math:`\eta`, a float or a 0-dim tensor.
        betas: :math:`(\beta_1, \beta_2, \beta_3)`, each in [0, 1). With :math:`\beta_1 = 0` no fast average is kept.
        alpha: weight of the slow average :math:`\alpha`; 4 to 10 in the paper.
        beta3_warmup: steps in which :math:`\beta_3(t)` grows from :math:`\beta_1` to :math:`\beta_3`, linearly in its
            half-life; None for no warmup. The paper takes the length of the run.
        alpha_warmup: steps in which :math:`\alpha(t)` grows from 0 to :math:`\alpha`; None for no warmup.
        eps: :math:`\epsilon`, added to the root of the second moment.
        weight_decay: :math:`\lambda`; the parameter shrinks by :math:`1 - \eta\lambda` before the update.
        maximize: ascend instead of descend.
        differentiable: run the reference backend and record it for autograd.
        backend: a name from `fasttrain.kernels.dispatch`, or None to choose.

    State: `step`, `exp_avg_fast` (unless :math:`\beta_1 = 0`), `exp_avg_slow` and `exp_avg_sq`.

    Raises:
        ValueError: a hyperparameter is out of its range.

    Example:
        >>> import torch
        >>> from fasttrain.optim import AdEMAMix
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = AdEMAMix([weight], lr=0.1, beta3_warmup=1000, alpha_warmup=1000)
        >>> weight.grad = torch.tensor([3.0, -0.5])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000, 1.1000])

    Reference: arXiv 2409.03137, algorithm 1 and equations 4 and 5.
    """

    rules = (MIXED, WITHOUT_FAST)
    counts_steps = True

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999, 0.9999), alpha=2.0, beta3_warmup=None, alpha_warmup=None,
                 eps=1e-8, weight_decay=0.0, *, maximize=False, differentiable=False, **options):
        check_hyperparameters(3, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, alpha=alpha)
        super().__init__(params, dict(lr=lr, betas=betas, alpha=alpha, beta3_warmup=beta3_warmup,
                                      alpha_warmup=alpha_warmup, eps=eps, weight_decay=weight_decay,
                                      maximize=maximize, differentiable=differentiable), **options)

    def rule_of(self, group):
        return WITHOUT_FAST if group["betas"][0] == 0 else MIXED
