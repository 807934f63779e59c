"""NAdam: Dozat, Incorporating Nesterov Momentum into Adam (ICLR workshop 2016, algorithm 2), in torch's form."""

from __future__ import annotations

import torch

from fasttrain.optim.made_by_torch import MadeByTorch
from fasttrain.rule import Rule, sqrt


def momentum_at(step, b1, momentum_decay):
    return b1 * (1.0 - 0.5 * 0.96 ** (step * momentum_decay))


def coefficients(step, lr, betas, eps, weight_decay, momentum_decay, decoupled_weight_decay, mu_product):
    b1, b2 = betas
    mu, mu_next = (momentum_at(at, b1, momentum_decay) for at in (step, step + 1))
    root = (1 - b2**step) ** 0.5
    keep, decay = (1 - lr * weight_decay, 0.0) if decoupled_weight_decay else (1.0, weight_decay)
    return dict(decay=decay, keep=keep, b1=b1, a1=1 - b1, b2=b2, a2=1 - b2, eps=eps * root,
                now=lr * root * (1 - mu) / (1 - mu_product), ahead=lr * root * mu_next / (1 - mu_product * mu_next))


def element(p, g, exp_avg, exp_avg_sq, k):
    g = g + k.decay * p
    exp_avg, exp_avg_sq = k.b1 * exp_avg + k.a1 * g, k.b2 * exp_avg_sq + k.a2 * g * g
    update = (k.now * g + k.ahead * exp_avg) / (sqrt(exp_avg_sq) + k.eps)
    return k.keep * p - update, exp_avg, exp_avg_sq


RULE = Rule("NAdam", ("exp_avg", "exp_avg_sq"), coefficients, element, positive=("exp_avg_sq",),
            retain={"exp_avg": "b1", "exp_avg_sq": "b2"})


ADVANCING = Rule("NAdamAdvancing", (), lambda step, betas, momentum_decay:
                 {"factor": momentum_at(step, betas[0], momentum_decay)}, lambda p, g, k: p * k.factor)


class NAdam(MadeByTorch, torch.optim.NAdam):
    r"""Adam with Nesterov's momentum: `torch.optim.NAdam`, its arguments, its states and its numbers.

    .. math::
        \mu_t = \beta_1 (1 - \tfrac12 0.96^{t\psi}), \quad
        m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \quad v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t^2, \quad
        \hat m_t = \frac{\mu_{t+1} m_t}{1 - \prod_{i=1}^{t+1}\mu_i} + \frac{(1-\mu_t) g_t}{1 - \prod_{i=1}^{t}\mu_i},
        \quad \theta_t = \theta_{t-1} - \eta\, \frac{\hat m_t}{\sqrt{v_t / (1-\beta_2^t)} + \epsilon}

    Arguments:
        params: parameters, named parameters, or parameter groups, as in `torch.optim.Optimizer`; float64, float32,
            bfloat16 or float16 of any shape, or complex. Gradients may have another real dtype than their parameter.
        lr: learning rate :math:`\eta`, a float or a 0-dim tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon`, added to the root of the second moment.
        weight_decay: :math:`\lambda`, added to the gradient first.
        momentum_decay: :math:`\psi`.
        decoupled_weight_decay: let the parameter shrink by :math:`1 - \eta\lambda` instead.
        maximize: ascend instead of descend.
        capturable: GPUs drive every step, which CUDA graphs can then hold (docs/graphs.md); `step` is on the GPU.
        foreach: accepted for torch's sake; every step here is fused.
        differentiable: run the reference backend and record it for autograd.
        backend: a name from `fasttrain.kernels.dispatch`, or None to choose.

    State: `step`, `mu_product` (one number), `exp_avg` and `exp_avg_sq`, as torch keeps them.

    Raises:
        ValueError: a hyperparameter is out of its range (torch's own texts).

    Example:
        >>> import torch
        >>> from fasttrain.optim import NAdam
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = NAdam([weight], lr=0.1)
        >>> weight.grad = torch.tensor([3.0, -0.5])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.8944, 1.1056])

    Reference: ICLR 2016 workshop, algorithm 2.
    """

    rules = (RULE,)
    running = ("mu_product",)
    advancing = ADVANCING
    advances_first = True

    def __init__(self, params, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, momentum_decay=4e-3,
                 decoupled_weight_decay=False, *, foreach=None, maximize=False, capturable=False, differentiable=False,
                 **options):
        self._take(options)
        torch.optim.NAdam.__init__(
            self, params, lr, betas, eps, weight_decay, momentum_decay, decoupled_weight_decay, foreach=foreach,
            maximize=maximize, capturable=capturable, differentiable=differentiable)

    def advance(self, state, group, step):
        old = state["mu_product"]
        product = (old * momentum_at(step, group["betas"][0], group["momentum_decay"])).to(old.dtype)
        return {"mu_product": product.double()}, {"mu_product": product}

    def advanced(self, before, by):
        product = before["mu_product"]
        return {"mu_product": product * by["factor"].to(product.dtype)}
