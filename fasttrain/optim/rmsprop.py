"""RMSprop: Hinton, Neural Networks for Machine Learning, lecture 6e (2012); centered: Graves (arXiv 1308.0850)."""

from __future__ import annotations

import torch

from fasttrain.optim.made_by_torch import MadeByTorch
from fasttrain.rule import Rule, sqrt


def coefficients(step, lr, alpha, eps, weight_decay, momentum):
    return dict(decay=weight_decay, alpha=alpha, part=1 - alpha, eps=eps, momentum=momentum, lr=lr)


def plain(p, g, square_avg, k):
    g = g + k.decay * p
    square_avg = k.alpha * square_avg + k.part * g * g
    return p - k.lr * (g / (sqrt(square_avg) + k.eps)), square_avg


def momentum(p, g, square_avg, momentum_buffer, k):
    g = g + k.decay * p
    square_avg = k.alpha * square_avg + k.part * g * g
    momentum_buffer = k.momentum * momentum_buffer + g / (sqrt(square_avg) + k.eps)
    return p - k.lr * momentum_buffer, square_avg, momentum_buffer


def centered(p, g, square_avg, grad_avg, k):
    g = g + k.decay * p
    square_avg, grad_avg = k.alpha * square_avg + k.part * g * g, k.alpha * grad_avg + k.part * g
    return p - k.lr * (g / (sqrt(square_avg - grad_avg * grad_avg) + k.eps)), square_avg, grad_avg


def centered_momentum(p, g, square_avg, momentum_buffer, grad_avg, k):
    g = g + k.decay * p
    square_avg, grad_avg = k.alpha * square_avg + k.part * g * g, k.alpha * grad_avg + k.part * g
    momentum_buffer = k.momentum * momentum_buffer + g / (sqrt(square_avg - grad_avg * grad_avg) + k.eps)
    return p - k.lr * momentum_buffer, square_avg, momentum_buffer, grad_avg


def rule(name, element, *others):
    retain = {"square_avg": "alpha", "momentum_buffer": "momentum", "grad_avg": "alpha"}
    state = ("square_avg", *others)
    return Rule(name, state, coefficients, element, ("square_avg",), {name: retain[name] for name in state})


PLAIN = rule("RMSprop", plain)
MOMENTUM = rule("RMSpropMomentum", momentum, "momentum_buffer")
CENTERED = rule("RMSpropCentered", centered, "grad_avg")
CENTERED_MOMENTUM = rule("RMSpropCenteredMomentum", centered_momentum, "momentum_buffer", "grad_avg")


class RMSprop(MadeByTorch, torch.optim.RMSprop):
    r"""Divided by the root of a running mean of squares: `torch.optim.RMSprop`, its arguments, states and numbers.

    .. math::
        g_t \leftarrow g_t + \lambda\theta_{t-1}, \quad
        v_t = \alpha v_{t-1} + (1-\alpha) g_t^2, \quad a_t = \alpha a_{t-1} + (1-\alpha) g_t, \quad
        b_t = \mu b_{t-1} + \frac{g_t}{\sqrt{v_t - [\text{centered}]\, a_t^2} + \epsilon}, \quad
        \theta_t = \theta_{t-1} - \eta\, b_t

    Arguments:
        params: parameters, named parameters, or parameter groups, as in `torch.optim.Optimizer`; float64, float32,
            bfloat16 or float16 of any shape, or complex. Gradients may have another real dtype than their parameter.
        lr: learning rate :math:`\eta`, a float or a 0-dim tensor.
        alpha: :math:`\alpha`.
        eps: :math:`\epsilon`, added to the root.
        weight_decay: :math:`\lambda`, added to the gradient.
        momentum: :math:`\mu`; 0 keeps no buffer.
        centered: divide by the root of the variance. Where it is lost in rounding (a gradient that has not changed for
            very long) the root is of a negative number, and the parameter becomes NaN, as in torch.
        maximize: ascend instead of descend.
        capturable: GPUs drive every step, which CUDA graphs can then hold (docs/graphs.md); `step` is on the GPU.
        foreach: accepted for torch's sake; every step here is fused.
        differentiable: run the reference backend and record it for autograd.
        backend: a name from `fasttrain.kernels.dispatch`, or None to choose.

    State: `step`, `square_avg`, with a momentum `momentum_buffer`, and `grad_avg` where centered, as torch keeps them.

    Raises:
        ValueError: a hyperparameter is out of its range (torch's own texts).

    Example:
        >>> import torch
        >>> from fasttrain.optim import RMSprop
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = RMSprop([weight], lr=0.01)
        >>> weight.grad = torch.tensor([3.0, -0.5])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000, 1.1000])

    Reference: lecture 6e; arXiv 1308.0850, section 2.3, for `centered`.
    """

    rules = (PLAIN, MOMENTUM, CENTERED, CENTERED_MOMENTUM)

    def __init__(self, params, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0, momentum=0, centered=False,
                 capturable=False, foreach=None, maximize=False, differentiable=False, **options):
        self._take(options)
        torch.optim.RMSprop.__init__(
            self, params, lr, alpha, eps, weight_decay, momentum, centered, capturable, foreach, maximize,
            differentiable)

    def rule_of(self, group):
        plain, momentum = (CENTERED, CENTERED_MOMENTUM) if group["centered"] else (PLAIN, MOMENTUM)
        return momentum if group["momentum"] > 0 else plain
