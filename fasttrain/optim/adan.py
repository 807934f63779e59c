"""Adan: Xie et al., Adaptive Nesterov Momentum Algorithm (arXiv 2208.06677, algorithm 1), without its restart."""

from __future__ import annotations

from fasttrain.optim.checks import check_hyperparameters
from fasttrain.optim.optimizer import Optimizer
from fasttrain.rule import sqrt


class Adan(Optimizer):
    r"""Adam with Nesterov's momentum, estimated from the differences of successive gradients.

    .. math::
        d_t = g_t - g_{t-1} \ (d_1 = 0), \quad
        m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \quad v_t = \beta_2 v_{t-1} + (1-\beta_2) d_t, \quad
        n_t = \beta_3 n_{t-1} + (1-\beta_3) (g_t + \beta_2 d_t)^2, \quad
        u_t = \frac{m_t / (1-\beta_1^t) + \beta_2 v_t / (1-\beta_2^t)}{\sqrt{n_t / (1-\beta_3^t)} + \epsilon}, \quad
        \theta_t = \frac{\theta_{t-1} - \eta\, u_t}{1 + \eta\lambda}

    The betas are those of the authors' code: 1 minus the paper's.

    Arguments:
        params: parameters, named parameters, or parameter groups, as in `torch.optim.Optimizer`; float64, float32,
            bfloat16 or float16 of any shape, or complex. Gradients may have another real dtype than their parameter.
        lr: learning rate :math:`\eta`, a float or a 0-dim tensor; five to ten times Adam's.
        betas: :math:`(\beta_1, \beta_2, \beta_3)`, each in [0, 1).
        eps: :math:`\epsilon`, added to the root of the second moment.
        weight_decay: :math:`\lambda`, by the proximal step above.
        no_prox: decay as in AdamW, :math:`\theta_t = (1 - \eta\lambda)\theta_{t-1} - \eta u_t`.
        maximize: ascend instead of descend.
        differentiable: run the reference backend and record it for autograd.
        backend: a name from `fasttrain.kernels.dispatch`, or None to choose.

    State: `step`, `exp_avg`, `exp_avg_diff`, `exp_avg_sq`, and the last gradient, negative, as `neg_pre_grad`.

    Raises:
        ValueError: a hyperparameter is out of its range.

    Example:
        >>> import torch
        >>> from fasttrain.optim import Adan
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = Adan([weight], lr=0.1)
        >>> weight.grad = torch.tensor([3.0, -0.5])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000, 1.1000])

    Reference: arXiv 2208.06677, algorithm 1, in the form of the authors' code.
    """

    state = ("exp_avg", "exp_avg_diff", "exp_avg_sq", "neg_pre_grad")  # type: ignore[assignment]
    positive = ("exp_avg_sq",)
    retain = {"exp_avg": "b1", "exp_avg_diff": "b2", "exp_avg_sq": "b3"}  # noqa: RUF012
    counts_steps = True

    @staticmethod
    def coefficients(step, lr, betas, eps, weight_decay, no_prox):
        b1, b2, b3 = betas
        root = (1 - b3**step) ** 0.5
        keep = 1 - lr * weight_decay if no_prox else 1 / (1 + lr * weight_decay)
        rate = lr * root * (1.0 if no_prox else keep)
        return dict(later=0.0 if step == 1 else 1.0, b1=b1, a1=1 - b1, b2=b2, a2=1 - b2, b3=b3, a3=1 - b3,
                    eps=eps * root, keep=keep, rate=rate / (1 - b1**step), ahead=rate * b2 / (1 - b2**step))

    @staticmethod
    def element(p, g, exp_avg, exp_avg_diff, exp_avg_sq, neg_pre_grad, k):
        diff = k.later * (g + neg_pre_grad)
        nesterov = g + k.b2 * diff
        exp_avg = k.b1 * exp_avg + k.a1 * g
        exp_avg_diff = k.b2 * exp_avg_diff + k.a2 * diff
        exp_avg_sq = k.b3 * exp_avg_sq + k.a3 * nesterov * nesterov
        update = (k.rate * exp_avg + k.ahead * exp_avg_diff) / (sqrt(exp_avg_sq) + k.eps)
        return k.keep * p - update, exp_avg, exp_avg_diff, exp_avg_sq, -g

    def __init__(self, params, lr=1e-3, betas=(0.98, 0.92, 0.99), eps=1e-8, weight_decay=0.0, no_prox=False, *,
                 maximize=False, differentiable=False, **options):
        check_hyperparameters(3, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, no_prox=no_prox,
                                      maximize=maximize, differentiable=differentiable), **options)
