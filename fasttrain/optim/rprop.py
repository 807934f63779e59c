"""Rprop: Riedmiller and Braun, A Direct Adaptive Method for Faster Backpropagation Learning (ICNN 1993)."""

from __future__ import annotations

import torch

from fasttrain.optim.checks import number
from fasttrain.optim.made_by_torch import MadeByTorch
from fasttrain.rule import Rule, maximum, minimum, sign, where


def coefficients(step, etas, step_sizes):
    return dict(less=etas[0], more=etas[1], least=step_sizes[0], most=step_sizes[1])


def element(p, g, prev, step_size, k):
    turn = g * prev
    factor = where(turn > 0.0, k.more, where(turn < 0.0, k.less, where(turn == 0.0, 1.0, turn)))  # NaN stays
    step_size = minimum(maximum(step_size * factor, k.least), k.most)
    g = where(turn < 0.0, 0.0, g)  # after a change of sign, stay once
    return p - sign(g) * step_size, g, step_size


RULE = Rule("Rprop", ("prev", "step_size"), coefficients, element, positive=("step_size",))


class Rprop(MadeByTorch, torch.optim.Rprop):
    r"""A step of its own for each element, along the gradient's sign: `torch.optim.Rprop`, its arguments and numbers.

    .. math::
        \gamma_t = \begin{cases}
            \min(\eta_+ \gamma_{t-1}, \Gamma_{max}) & g_{t-1} g_t > 0 \\
            \max(\eta_- \gamma_{t-1}, \Gamma_{min}),\ g_t \leftarrow 0 & g_{t-1} g_t < 0 \\
            \gamma_{t-1} & \text{else} \end{cases}, \quad
        \theta_t = \theta_{t-1} - \gamma_t\, \mathrm{sign}(g_t)

    Arguments:
        params: parameters, named parameters, or parameter groups, as in `torch.optim.Optimizer`; float64, float32,
            bfloat16 or float16 of any shape, or complex. Gradients may have another real dtype than their parameter.
        lr: the first step size :math:`\gamma_0`, a float or a 0-dim tensor.
        etas: :math:`(\eta_-, \eta_+)`, below and above 1.
        step_sizes: :math:`(\Gamma_{min}, \Gamma_{max})`.
        maximize: ascend instead of descend.
        capturable: GPUs drive every step, which CUDA graphs can then hold (docs/graphs.md); `step` is on the GPU.
        foreach: accepted for torch's sake; every step here is fused.
        differentiable: run the reference backend and record it for autograd.
        backend: a name from `fasttrain.kernels.dispatch`, or None to choose.

    State: `step`, `prev` (the last gradient) and `step_size`, as torch keeps them.

    Raises:
        ValueError: a hyperparameter is out of its range (torch's own texts).

    Example:
        >>> import torch
        >>> from fasttrain.optim import Rprop
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = Rprop([weight], lr=0.1)
        >>> weight.grad = torch.tensor([3.0, -0.5])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000, 1.1000])

    Reference: Riedmiller and Braun, ICNN 1993.
    """

    rules = (RULE,)

    def __init__(self, params, lr=1e-2, etas=(0.5, 1.2), step_sizes=(1e-6, 50), *, capturable=False, foreach=None,
                 maximize=False, differentiable=False, **options):
        self._take(options)
        torch.optim.Rprop.__init__(
            self, params, lr, etas, step_sizes, capturable=capturable, foreach=foreach, maximize=maximize,
            differentiable=differentiable)

    def init_state(self, p, group, rule):
        made = super().init_state(p, group, rule)
        if made:  # torch's has the gradient's dtype and strides
            lr = number(group["lr"])
            value = complex(lr, lr) if p.is_complex() else lr
            self.state[p]["step_size"] = torch.full_like(p, value, memory_format=torch.preserve_format)
        return made
