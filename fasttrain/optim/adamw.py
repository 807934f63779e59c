"""Adam and AdamW: Kingma and Ba (arXiv 1412.6980, algorithm 1); Loshchilov and Hutter (arXiv 1711.05101, algorithm 2).

AMSGrad: Reddi, Kale and Kumar (arXiv 1904.09237, algorithm 2), in torch's form: the maximum is taken before the bias
correction.
"""

from __future__ import annotations

import torch

from fasttrain.optim.optimizer import Optimizer
from fasttrain.rule import Rule, maximum, sqrt


def coefficients(step, lr, betas, eps, weight_decay):
    b1, b2 = betas
    # Bias corrections: m / c1 / (sqrt(v) / root + eps) is (root / c1) m / (sqrt(v) + root eps).
    root = (1 - b2**step) ** 0.5
    return dict(keep=1 - lr * weight_decay, decay=weight_decay, b1=b1, a1=1 - b1, b2=b2, a2=1 - b2,
                rate=lr * root / (1 - b1**step), eps=eps * root)


def moments(g, exp_avg, exp_avg_sq, k):
    return k.b1 * exp_avg + k.a1 * g, k.b2 * exp_avg_sq + k.a2 * g * g


def adamw(p, g, exp_avg, exp_avg_sq, k):
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, k)
    return k.keep * p - k.rate * (exp_avg / (sqrt(exp_avg_sq) + k.eps)), exp_avg, exp_avg_sq


def adamw_amsgrad(p, g, exp_avg, exp_avg_sq, max_exp_avg_sq, k):
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, k)
    max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
    return k.keep * p - k.rate * (exp_avg / (sqrt(max_exp_avg_sq) + k.eps)), exp_avg, exp_avg_sq, max_exp_avg_sq


def adam_l2(p, g, exp_avg, exp_avg_sq, k):
    exp_avg, exp_avg_sq = moments(g + k.decay * p, exp_avg, exp_avg_sq, k)
    return p - k.rate * (exp_avg / (sqrt(exp_avg_sq) + k.eps)), exp_avg, exp_avg_sq


def adam_l2_amsgrad(p, g, exp_avg, exp_avg_sq, max_exp_avg_sq, k):
    exp_avg, exp_avg_sq = moments(g + k.decay * p, exp_avg, exp_avg_sq, k)
    max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
    return p - k.rate * (exp_avg / (sqrt(max_exp_avg_sq) + k.eps)), exp_avg, exp_avg_sq, max_exp_avg_sq


STATE = ("exp_avg", "exp_avg_sq")
POSITIVE = ("exp_avg_sq", "max_exp_avg_sq")
RETAIN = {"exp_avg": "b1", "exp_avg_sq": "b2"}
DECOUPLED = Rule("AdamW", STATE, coefficients, adamw, POSITIVE, RETAIN)
DECOUPLED_AMSGRAD = Rule("AdamWAmsgrad", (*STATE, "max_exp_avg_sq"), coefficients, adamw_amsgrad, POSITIVE, RETAIN)
L2 = Rule("AdamL2", STATE, coefficients, adam_l2, POSITIVE, RETAIN)
L2_AMSGRAD = Rule("AdamL2Amsgrad", (*STATE, "max_exp_avg_sq"), coefficients, adam_l2_amsgrad, POSITIVE, RETAIN)


class Adam(Optimizer, torch.optim.Adam):
    r"""Adam with L2 weight decay: `torch.optim.Adam`, its arguments, its states and its numbers.

    .. math::
        g_t \leftarrow g_t + \lambda\theta_{t-1}, \quad
        m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \quad v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t^2, \quad
        \theta_t = \theta_{t-1} - \eta\, \frac{m_t / (1-\beta_1^t)}{\sqrt{v_t / (1-\beta_2^t)} + \epsilon}

    Arguments:
        params: parameters, named parameters, or parameter groups, as in `torch.optim.Optimizer`; float64, float32,
            bfloat16 or float16 of any shape, or complex. Gradients may have another real dtype than their parameter.
        lr: learning rate :math:`\eta`, a float or a 0-dim tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon`, added to the root of the second moment.
        weight_decay: :math:`\lambda`, added to the gradient (with `decoupled_weight_decay`, as in `AdamW`).
        amsgrad: divide by the root of the largest second moment so far.
        maximize: ascend instead of descend.
        capturable: GPUs drive every step, which CUDA graphs can then hold (docs/graphs.md); `step` is on the GPU.
        foreach, fused: accepted for torch's sake; every step here is fused.
        differentiable: run the reference backend and record it for autograd.
        backend: a name from `fasttrain.kernels.dispatch`, or None to choose.

    State: `step`, `exp_avg`, `exp_avg_sq`, and with `amsgrad` `max_exp_avg_sq`, as torch keeps them.

    Raises:
        ValueError: a hyperparameter is out of its range (torch's own texts).

    Example:
        >>> import torch
        >>> from fasttrain.optim import Adam
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = Adam([weight], lr=0.1)
        >>> weight.grad = torch.tensor([3.0, -0.5])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000, 1.1000])

    Reference: arXiv 1412.6980, algorithm 1.
    """

    rules = (DECOUPLED, DECOUPLED_AMSGRAD, L2, L2_AMSGRAD)
    counts_steps = True

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, amsgrad=False, *, foreach=None,
                 maximize=False, capturable=False, differentiable=False, fused=None, decoupled_weight_decay=False,
                 **options):
        self._take(options)
        torch.optim.Adam.__init__(
            self, params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach, maximize=maximize,
            capturable=capturable, differentiable=differentiable, fused=fused,
            decoupled_weight_decay=decoupled_weight_decay)

    def rule_of(self, group):
        # Without decay the two are one: `keep` is exactly 1.
        if group["decoupled_weight_decay"] or group["weight_decay"] == 0:
            return DECOUPLED_AMSGRAD if group["amsgrad"] else DECOUPLED
        return L2_AMSGRAD if group["amsgrad"] else L2

    def init_state(self, p, group, rule):
        made = not self.state[p]
        if made or group["differentiable"]:  # torch's own: keys, dtypes and devices as its version has them, its errors
            self._init_group({**group, "params": [p]}, [], [], [], [], [], [])
        return made

    def step_sparse(self, p, grad, group):
        raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")


class AdamW(Adam, torch.optim.AdamW):
    r"""Adam with decoupled weight decay: `torch.optim.AdamW`, its arguments, its states and its numbers.

    .. math::
        m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \quad v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t^2, \quad
        \theta_t = (1-\eta\lambda)\,\theta_{t-1} -
            \eta\, \frac{m_t / (1-\beta_1^t)}{\sqrt{v_t / (1-\beta_2^t)} + \epsilon}

    Arguments:
        weight_decay: :math:`\lambda`; the parameter shrinks by :math:`1 - \eta\lambda` before the update.
        params, lr, betas, eps, amsgrad, maximize, foreach, capturable, differentiable, fused, backend: as in `Adam`.

    State: `step`, `exp_avg`, `exp_avg_sq`, and with `amsgrad` `max_exp_avg_sq`, as torch keeps them.

    Raises:
        ValueError: a hyperparameter is out of its range (torch's own texts).

    Example:
        >>> import torch
        >>> from fasttrain.optim import AdamW                      # was: from torch.optim import AdamW
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = AdamW(model.parameters(), lr=3e-4)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()

    Reference: arXiv 1711.05101, algorithm 2.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False, *,
                 maximize=False, foreach=None, capturable=False, differentiable=False, fused=None, **options):
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach, maximize=maximize,
                         capturable=capturable, differentiable=differentiable, fused=fused,
                         decoupled_weight_decay=True, **options)
