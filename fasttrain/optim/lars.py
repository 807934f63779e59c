"""LARS: You, Gitman and Ginsburg, Large Batch Training of Convolutional Networks (arXiv 1708.03888, algorithm 1)."""

from __future__ import annotations

import numpy as np

from fasttrain.optim.checks import check_hyperparameters
from fasttrain.optim.two_stage import TwoStage
from fasttrain.rule import Rule


def nothing(step):
    return {}


def measure(p, g, k):
    return p, p * p, g * g


def measure_with_momentum(p, g, momentum_buffer, k):
    return p, momentum_buffer, p * p, g * g


def trust(step, lr, momentum, weight_decay, trust_coefficient, eps, adapt, p_sq, g_sq):
    size, length = np.sqrt(p_sq), np.sqrt(g_sq)
    ratio = np.where((size > 0) & (length > 0), trust_coefficient * size / (length + weight_decay * size + eps), 1.0)
    return dict(rate=lr * (ratio if adapt else 1.0), decay=weight_decay, momentum=momentum)


def descend(p, g, k):
    return p - k.rate * (g + k.decay * p)


def heavy_ball(p, g, momentum_buffer, k):
    momentum_buffer = k.momentum * momentum_buffer + k.rate * (g + k.decay * p)
    return p - momentum_buffer, momentum_buffer


def nesterov(p, g, momentum_buffer, k):
    move = k.rate * (g + k.decay * p)
    momentum_buffer = k.momentum * momentum_buffer + move
    return p - (move + k.momentum * momentum_buffer), momentum_buffer


BUFFER = ("momentum_buffer",)
RETAIN = {"momentum_buffer": "momentum"}
MEASURE_PLAIN = Rule("LARSMeasurePlain", (), nothing, measure, sums=("p_sq", "g_sq"))
MEASURE = Rule("LARSMeasure", BUFFER, nothing, measure_with_momentum, sums=("p_sq", "g_sq"))
PLAIN = Rule("LARSPlain", (), trust, descend, sums=())
MOMENTUM = Rule("LARSMomentum", BUFFER, trust, heavy_ball, retain=RETAIN, sums=())
NESTEROV = Rule("LARSNesterov", BUFFER, trust, nesterov, retain=RETAIN, sums=())


class LARS(TwoStage):
    r"""Momentum descent whose rate is scaled for each parameter by its norm over its gradient's.

    .. math::
        \lambda_t = \tau\, \frac{\|\theta_{t-1}\|}{\|g_t\| + \beta\|\theta_{t-1}\| + \epsilon}, \quad
        b_t = \mu b_{t-1} + \eta\lambda_t (g_t + \beta\theta_{t-1}), \quad
        \theta_t = \theta_{t-1} - b_t

    As in the paper, the rate enters the momentum. Where a norm is zero, :math:`\lambda_t` is 1. Two walks: 8 (with
    momentum 12) and 12 (20) bytes an element in fp32.

    Arguments:
        params: parameters, named parameters, or parameter groups, as in `torch.optim.Optimizer`; float64, float32,
            bfloat16 or float16 of any shape, or complex.
        lr: learning rate :math:`\eta`, a float or a 0-dim tensor.
        momentum: :math:`\mu`; 0 keeps no buffer.
        weight_decay: :math:`\beta`, added to the gradient.
        trust_coefficient: :math:`\tau`.
        eps: :math:`\epsilon`, added to the divisor.
        nesterov: look ahead by one more step of the momentum.
        adapt: False leaves the rate alone: :math:`\lambda_t = 1`; meant for a parameter group (gains and biases).
        maximize: ascend instead of descend.
        backend: a name from `fasttrain.kernels.dispatch`, or None to choose.

    State: `momentum_buffer` where `momentum` is not 0.

    Raises:
        ValueError: a hyperparameter is out of its range.

    Example:
        >>> import torch
        >>> from fasttrain.optim import LARS
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = LARS([weight], lr=1.0, trust_coefficient=0.1, eps=0.0)
        >>> weight.grad = torch.tensor([0.0, 20.0])
        >>> optimizer.step()
        >>> weight.data
        tensor([3.0000, 3.5000])

    Reference: arXiv 1708.03888, algorithm 1.
    """

    rules = (MEASURE_PLAIN, MEASURE, PLAIN, MOMENTUM, NESTEROV)

    def __init__(self, params, lr=1e-3, momentum=0.9, weight_decay=0.0, trust_coefficient=1e-3, eps=1e-8, *,
                 nesterov=False, adapt=True, maximize=False, **options):
        check_hyperparameters(lr=lr, momentum=momentum, weight_decay=weight_decay, eps=eps,
                              trust_coefficient=trust_coefficient)
        if nesterov and momentum == 0:
            raise ValueError("Nesterov momentum requires a momentum")
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eps=eps, adapt=adapt,
                                      trust_coefficient=trust_coefficient, nesterov=nesterov, maximize=maximize),
                         **options)

    def rule_of(self, group):
        return MEASURE_PLAIN if group["momentum"] == 0 else MEASURE

    def second_of(self, group):
        return PLAIN if group["momentum"] == 0 else NESTEROV if group["nesterov"] else MOMENTUM
