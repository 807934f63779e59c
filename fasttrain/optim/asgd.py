"""Averaged stochastic gradient descent: Polyak and Juditsky (SIAM J. Control Optim. 30, 1992), in torch's form."""

from __future__ import annotations

import torch

from fasttrain.optim.made_by_torch import MadeByTorch
from fasttrain.rule import Rule, where


def coefficients(step, lambd, weight_decay, eta, mu):
    return dict(decay=weight_decay, keep=1 - lambd * eta, eta=eta, mu=mu, old=1 - mu)


def element(p, g, ax, k):
    p = k.keep * p - k.eta * (g + k.decay * p)
    return p, where(k.old > 0.0, k.old * ax + k.mu * p, p)  # before the averaging starts, a copy


RULE = Rule("ASGD", ("ax",), coefficients, element, retain={"ax": "old"}, exact=("ax",))


def rates(step, lr, lambd, alpha, t0):
    return dict(eta=lr / (1 + lambd * lr * step) ** alpha, mu=1 / max(1, step - t0))


ADVANCING = Rule("ASGDAdvancing", (), rates, lambda p, g, k: k.eta * p + k.mu * g)


class ASGD(MadeByTorch, torch.optim.ASGD):
    r"""Descent with a decaying rate, and the average of its way: `torch.optim.ASGD`, its arguments, states and numbers.

    .. math::
        \theta_t = (1 - \lambda_d \eta_{t-1})\,\theta_{t-1} - \eta_{t-1} (g_t + \lambda\theta_{t-1}), \quad
        \bar\theta_t = \bar\theta_{t-1} + \mu_{t-1} (\theta_t - \bar\theta_{t-1}), \quad
        \eta_t = \frac{\eta}{(1 + \lambda_d \eta t)^\alpha}, \quad \mu_t = \frac{1}{\max(1, t - t_0)}

    Arguments:
        params: parameters, named parameters, or parameter groups, as in `torch.optim.Optimizer`; float64, float32,
            bfloat16 or float16 of any shape, or complex. Gradients may have another real dtype than their parameter.
        lr: learning rate :math:`\eta = \eta_0`, a float or a 0-dim tensor.
        lambd: decay :math:`\lambda_d`.
        alpha: power :math:`\alpha`.
        t0: the step at which averaging starts, :math:`t_0`; until then :math:`\mu = 1`.
        weight_decay: :math:`\lambda`, added to the gradient.
        maximize: ascend instead of descend.
        capturable: GPUs drive every step, which CUDA graphs can then hold (docs/graphs.md); `step` is on the GPU.
        foreach: accepted for torch's sake; every step here is fused.
        differentiable: run the reference backend and record it for autograd.
        backend: a name from `fasttrain.kernels.dispatch`, or None to choose.

    State: `step`, `eta`, `mu` (one number each) and `ax`, the average :math:`\bar\theta`, as torch keeps them.

    Raises:
        ValueError: a hyperparameter is out of its range (torch's own texts).

    Example:
        >>> import torch
        >>> from fasttrain.optim import ASGD
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = ASGD([weight], lr=0.1)
        >>> weight.grad = torch.tensor([3.0, -0.5])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.7000, 1.0500])

    Reference: Acceleration of Stochastic Approximation by Averaging, SIAM J. Control Optim. 30, 1992.
    """

    rules = (RULE,)
    running = ("eta", "mu")
    advancing = ADVANCING

    def __init__(self, params, lr=1e-2, lambd=1e-4, alpha=0.75, t0=1e6, weight_decay=0, foreach=None,
                 maximize=False, differentiable=False, capturable=False, **options):
        self._take(options)
        torch.optim.ASGD.__init__(
            self, params, lr, lambd, alpha, t0, weight_decay, foreach, maximize, differentiable, capturable)

    def advance(self, state, group, step):
        now = {name: state[name].to(torch.float64, copy=True) for name in self.running}
        return now, rates(step, group["lr"], group["lambd"], group["alpha"], group["t0"])
