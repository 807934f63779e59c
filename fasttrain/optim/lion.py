"""Lion: Chen et al., Symbolic Discovery of Optimization Algorithms (arXiv 2302.06675, program 1)."""

from __future__ import annotations

from fasttrain.optim.checks import check_hyperparameters
from fasttrain.optim.optimizer import Optimizer
from fasttrain.rule import sign


class Lion(Optimizer):
    r"""The sign of an interpolated momentum, with decoupled weight decay.

    .. math::
        u_t = \mathrm{sign}(\beta_1 m_{t-1} + (1-\beta_1) g_t), \quad
        \theta_t = (1 - \eta\lambda)\,\theta_{t-1} - \eta\, u_t, \quad
        m_t = \beta_2 m_{t-1} + (1-\beta_2) g_t

    Arguments:
        params: parameters, named parameters, or parameter groups, as in `torch.optim.Optimizer`; float64, float32,
            bfloat16 or float16 of any shape. Gradients may have another real dtype than their parameter.
        lr: learning rate :math:`\eta`, a float or a 0-dim tensor; about a third to a tenth of AdamW's.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        weight_decay: :math:`\lambda`; three to ten times AdamW's.
        maximize: ascend instead of descend.
        differentiable: run the reference backend and record it for autograd.
        backend: a name from `fasttrain.kernels.dispatch`, or None to choose.

    State: `exp_avg`, of the parameter's dtype and shape: half of AdamW's memory.

    Raises:
        ValueError: a hyperparameter is out of its range.

    Example:
        >>> import torch
        >>> from fasttrain.optim import Lion
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = Lion([weight], lr=0.1)
        >>> weight.grad = torch.tensor([3.0, -0.5])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000, 1.1000])

    Reference: arXiv 2302.06675, program 1.
    """

    state = ("exp_avg",)  # type: ignore[assignment]  # of the class; torch's, by parameter, is the instance's

    @staticmethod
    def coefficients(step, lr, betas, weight_decay):
        b1, b2 = betas
        return dict(keep=1 - lr * weight_decay, lr=lr, b1=b1, a1=1 - b1, b2=b2, a2=1 - b2)

    @staticmethod
    def element(p, g, exp_avg, k):
        update = sign(k.b1 * exp_avg + k.a1 * g)
        return k.keep * p - k.lr * update, k.b2 * exp_avg + k.a2 * g

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, *, maximize=False, differentiable=False,
                 **options):
        check_hyperparameters(lr=lr, betas=betas, weight_decay=weight_decay)
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize,
                                      differentiable=differentiable), **options)
