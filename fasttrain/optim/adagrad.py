"""Adagrad: Duchi, Hazan and Singer (JMLR 12, 2011, figure 1), with torch's learning rate decay."""

from __future__ import annotations

import torch
from torch.optim.adagrad import adagrad

from fasttrain.optim.made_by_torch import MadeByTorch
from fasttrain.rule import Rule, sqrt


def coefficients(step, lr, lr_decay, weight_decay, eps):
    # `one` multiplies the old sum, which needs no multiplication.
    return dict(decay=weight_decay, rate=lr / (1 + (step - 1) * lr_decay), eps=eps, one=1.0)


def element(p, g, sum, k):
    g = g + k.decay * p
    sum = sum + g * g
    return p - k.rate * (g / (sqrt(sum) + k.eps)), sum


RULE = Rule("Adagrad", ("sum",), coefficients, element, positive=("sum",), retain={"sum": "one"})


class Adagrad(MadeByTorch, torch.optim.Adagrad):
    r"""Divided by the root of the sum of all squares: `torch.optim.Adagrad`, its arguments, its states and its numbers.

    .. math::
        g_t \leftarrow g_t + \lambda\theta_{t-1}, \quad
        s_t = s_{t-1} + g_t^2, \quad
        \theta_t = \theta_{t-1} - \frac{\eta}{1 + (t-1)\,\delta}\, \frac{g_t}{\sqrt{s_t} + \epsilon}

    Arguments:
        params: parameters, named parameters, or parameter groups, as in `torch.optim.Optimizer`; float64, float32,
            bfloat16 or float16 of any shape, or complex. Gradients may have another real dtype than their parameter;
            sparse ones go through torch's own function.
        lr: learning rate :math:`\eta`, a float or a 0-dim tensor.
        lr_decay: :math:`\delta`.
        weight_decay: :math:`\lambda`, added to the gradient; sparse gradients do without.
        initial_accumulator_value: :math:`s_0`.
        eps: :math:`\epsilon`, added to the root of the sum.
        maximize: ascend instead of descend.
        foreach, fused: accepted for torch's sake; every step here is fused.
        differentiable: run the reference backend and record it for autograd.
        backend: a name from `fasttrain.kernels.dispatch`, or None to choose.

    State: `step` and `sum`, as torch keeps them: from the constructor on.

    Raises:
        ValueError: a hyperparameter is out of its range (torch's own texts).

    Example:
        >>> import torch
        >>> from fasttrain.optim import Adagrad
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = Adagrad([weight], lr=0.5)
        >>> weight.grad = torch.tensor([3.0, -0.5])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.5000, 1.5000])

    Reference: Adaptive Subgradient Methods for Online Learning and Stochastic Optimization, JMLR 12, 2011.
    """

    rules = (RULE,)

    def __init__(self, params, lr=1e-2, lr_decay=0, weight_decay=0, initial_accumulator_value=0, eps=1e-10,
                 foreach=None, *, maximize=False, differentiable=False, fused=None, **options):
        self._take(options)
        torch.optim.Adagrad.__init__(
            self, params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, foreach, maximize=maximize,
            differentiable=differentiable, fused=fused)

    def step_sparse(self, p, grad, group):
        if group["weight_decay"] != 0:  # torch says so too, when it has counted the step
            raise RuntimeError("weight_decay option is not compatible with sparse gradients")
        self.init_state(p, group, RULE)
        state, options = self.state[p], ("lr", "weight_decay", "lr_decay", "eps", "maximize")
        adagrad([p], [grad], [state["sum"]], [state["step"]], has_sparse_grad=True, foreach=False, fused=False,
                **{name: group[name] for name in options})
