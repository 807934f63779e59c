"""Stochastic gradient descent with momentum: Sutskever et al. (ICML 2013), in torch's form."""

from __future__ import annotations

import torch
from torch.optim.sgd import sgd

from fasttrain.optim.optimizer import Optimizer
from fasttrain.rule import Rule


def coefficients(step, lr, momentum, dampening, weight_decay):
    # The first buffer is the gradient itself, not dampened. `step` is 1 there and 2 ever after: torch keeps no count.
    first = step == 1
    return dict(lr=lr, decay=weight_decay, ahead=momentum,
                keep=0.0 if first else momentum, add=1.0 if first else 1 - dampening)


def descend(p, g, k):
    return p - k.lr * g


def momentum(p, g, momentum_buffer, k):
    momentum_buffer = k.keep * momentum_buffer + k.add * g
    return p - k.lr * momentum_buffer, momentum_buffer


def nesterov(p, g, momentum_buffer, k):
    momentum_buffer = k.keep * momentum_buffer + k.add * g
    return p - k.lr * (g + k.ahead * momentum_buffer), momentum_buffer


def with_decay(element):
    """The same equation with L2 weight decay added to the gradient."""
    def decayed(p, g, *states_and_k):
        return element(p, g + states_and_k[-1].decay * p, *states_and_k)
    return decayed


BUFFER = ("momentum_buffer",)
RETAIN = {"momentum_buffer": "keep"}
PLAIN = Rule("SGD", (), coefficients, descend)
MOMENTUM = Rule("SGDMomentum", BUFFER, coefficients, momentum, retain=RETAIN)
NESTEROV = Rule("SGDNesterov", BUFFER, coefficients, nesterov, retain=RETAIN)
PLAIN_L2 = Rule("SGDL2", (), coefficients, with_decay(descend))
MOMENTUM_L2 = Rule("SGDL2Momentum", BUFFER, coefficients, with_decay(momentum), retain=RETAIN)
NESTEROV_L2 = Rule("SGDL2Nesterov", BUFFER, coefficients, with_decay(nesterov), retain=RETAIN)


class SGD(Optimizer, torch.optim.SGD):
    r"""Stochastic gradient descent: `torch.optim.SGD`, its arguments, its states and its numbers.

    .. math::
        g_t \leftarrow g_t + \lambda\theta_{t-1}, \quad b_t = \mu b_{t-1} + (1-\tau) g_t \ (b_1 = g_1), \quad
        \theta_t = \theta_{t-1} - \eta\, u_t, \quad
        u_t = g_t, \ b_t \ \text{or (Nesterov)} \ g_t + \mu b_t

    Arguments:
        params: parameters, named parameters, or parameter groups, as in `torch.optim.Optimizer`; float64, float32,
            bfloat16 or float16 of any shape, or complex. Sparse gradients go through torch's own function.
        lr: learning rate :math:`\eta`, a float or a 0-dim tensor.
        momentum: :math:`\mu`; 0 keeps no buffer.
        dampening: :math:`\tau`.
        weight_decay: :math:`\lambda`, added to the gradient.
        nesterov: look ahead; needs a momentum and zero dampening.
        maximize: ascend instead of descend.
        foreach, fused: accepted for torch's sake; every step here is fused.
        differentiable: run the reference backend and record it for autograd.
        backend: a name from `fasttrain.kernels.dispatch`, or None to choose.

    State: `momentum_buffer` where `momentum` is not 0, as torch keeps it.

    Raises:
        ValueError: a hyperparameter is out of its range (torch's own texts).

    Example:
        >>> import torch
        >>> from fasttrain.optim import SGD
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = SGD([weight], lr=0.1, momentum=0.9)
        >>> weight.grad = torch.tensor([1.0, -1.0])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000, 1.1000])

    Reference: Sutskever, Martens, Dahl and Hinton, On the importance of initialization and momentum in deep learning,
        ICML 2013, section 2.
    """

    rules = (PLAIN, MOMENTUM, NESTEROV, PLAIN_L2, MOMENTUM_L2, NESTEROV_L2)

    def __init__(self, params, lr=1e-3, momentum=0, dampening=0, weight_decay=0, nesterov=False, *, maximize=False,
                 foreach=None, differentiable=False, fused=None, **options):
        self._take(options)
        torch.optim.SGD.__init__(
            self, params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize, foreach=foreach,
            differentiable=differentiable, fused=fused)

    def rule_of(self, group):
        plain, momentum, nesterov = (
            (PLAIN, MOMENTUM, NESTEROV) if group["weight_decay"] == 0 else (PLAIN_L2, MOMENTUM_L2, NESTEROV_L2))
        return plain if group["momentum"] == 0 else nesterov if group["nesterov"] else momentum

    def step_sparse(self, p, grad, group):
        state = self.state[p]
        buffers = [state.get("momentum_buffer")] if group["momentum"] != 0 else []
        options = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")
        sgd([p], [grad], buffers, has_sparse_grad=True, foreach=False, fused=False,
            **{name: group[name] for name in options})
        if buffers:
            state["momentum_buffer"] = buffers[0]
