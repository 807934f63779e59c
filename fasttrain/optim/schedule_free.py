"""Schedule-free SGD and AdamW: Defazio et al., The Road Less Scheduled (arXiv 2405.15682).

Gradients are taken at y, between the fast iterate z and its average x. In training the parameter is y, and x is never
kept: y and z say where it is.
"""

from __future__ import annotations

import torch

from fasttrain.optim.checks import check_hyperparameters, number
from fasttrain.optim.optimizer import Optimizer
from fasttrain.rule import Rule, Step, sqrt

RUNNING = ("k", "weight_sum", "lr_max")  # of a group: steps made, sum of the average's weights, largest rate
SCHEDULE = (*RUNNING, "lr", "warmup_steps", "r", "weight_lr_power")


def schedule(k, weight_sum, lr_max, lr, warmup_steps, r, weight_lr_power, correction=1.0):
    """The rate of the step to come, the share of z in the average, and the running numbers after the step."""
    lr = lr * correction * ((k + 1) / warmup_steps if k < warmup_steps else 1.0)
    lr_max = max(lr, lr_max)
    weight = (k + 1) ** r * lr_max**weight_lr_power
    weight_sum = weight_sum + weight
    return lr, weight / weight_sum if weight_sum else 0.0, (k + 1, weight_sum, lr_max)


def rates(lr, share, beta):
    """y goes towards z by `share`, and by `rate` along the gradient; z by `lr`. `one` multiplies the old z."""
    return dict(stay=1 - share, share=share, rate=lr * (1 - beta * (1 - share)), lr=lr, one=1.0)


def advancing(name, correction):
    """What a device advances the running numbers with; `correction` is a function of k and the group's betas."""
    def coefficients(step, k, weight_sum, lr_max, lr, warmup_steps, r, weight_lr_power, betas):
        after = schedule(k, weight_sum, lr_max, lr, warmup_steps, r, weight_lr_power, correction(k, betas))[2]
        return dict(zip(RUNNING, after, strict=True))

    return Rule(name, (), coefficients, lambda p, g, k: p * k.k + p * k.weight_sum + g * k.lr_max)


class ScheduleFree(Optimizer):
    """What both have in common: the running numbers of a group, and the two points that a parameter can be."""

    running_of_groups = RUNNING

    def __init__(self, params, defaults, **options):
        beta = self.mix(defaults)
        if not 0.0 < beta < 1.0:  # x = y + (1 - 1 / beta) (z - y)
            raise ValueError(f"Invalid momentum: {beta}; it must be above 0 and below 1, or the average is lost")
        running = dict(k=0, weight_sum=0.0, lr_max=-1.0, train_mode=True)
        super().__init__(params, {**defaults, **running}, **options)

    @staticmethod
    def mix(group):
        """How far y is from z on the way to x."""
        raise NotImplementedError

    @staticmethod
    def correction(group):
        return 1.0

    def init_state(self, p, group, rule):
        fresh = self.state[p].get("z") is None
        if fresh:
            self.state[p]["z"] = p.detach().clone(memory_format=torch.preserve_format)
        return super().init_state(p, group, rule) or fresh

    @torch._disable_dynamo
    def _step(self):
        for index, group in enumerate(self.param_groups):
            if not group["train_mode"]:
                raise RuntimeError(f"parameter group {index} is in evaluation mode: its parameters are averages, where "
                                   "no gradient is taken. Call optimizer.train() before the forward pass")
        super()._step()

    def _hyperparameters(self, rule, group):
        return super()._hyperparameters(rule, {"betas": (), **group})

    def stepped(self):
        for group in self.param_groups:
            numbers = {name: number(group[name]) for name in SCHEDULE}
            after = schedule(**numbers, correction=self.correction(group))[2]
            group.update(zip(RUNNING, after, strict=True))

    def train(self):
        """Put the parameters where gradients are taken, y. Does nothing in training mode, which is the first one."""
        self._swap(True, lambda beta: 1 - beta)

    def eval(self):
        """Put the averages x into the parameters: for evaluation, and for saving the model. Does nothing there."""
        self._swap(False, lambda beta: 1 - 1 / beta)

    @torch.no_grad()
    def _swap(self, train, weight_of):
        for group in self.param_groups:
            if group["train_mode"] != train:
                weight = weight_of(number(self.mix(group)))
                for p in group["params"]:
                    if "z" in self.state.get(p, ()):
                        wide = torch.promote_types(p.dtype, torch.float32)
                        p.copy_(torch.lerp(p.to(wide), self.state[p]["z"].to(p.device, wide), weight))
                group["train_mode"] = train


class ScheduleFreeSGD(ScheduleFree):
    r"""SGD whose average is the model: no schedule of the learning rate, and no end of the run to be known.

    .. math::
        u_t = g_t(y_t) + \lambda y_t, \quad z_{t+1} = z_t - \gamma_t u_t, \quad
        x_{t+1} = (1 - c_t)\, x_t + c_t z_{t+1}, \quad y_{t+1} = (1 - \beta)\, z_{t+1} + \beta\, x_{t+1}, \quad
        c_t = \frac{w_t}{\sum_{i \le t} w_i}, \quad w_t = t^r (\max_{i \le t} \gamma_i)^q

    Arguments:
        params: parameters, named parameters, or parameter groups, as in `torch.optim.Optimizer`; float64, float32,
            bfloat16 or float16 of any shape, or complex. Gradients may have another real dtype than their parameter.
        lr: learning rate :math:`\gamma`, a float or a 0-dim tensor.
        momentum: :math:`\beta`, above 0 and below 1.
        weight_decay: :math:`\lambda`, of the point that gradients are taken at, added to the gradient.
        warmup_steps: steps in which :math:`\gamma_t` grows to its full size; 0 for none.
        r: power of the step in the average's weights, :math:`r`.
        weight_lr_power: power of the largest rate so far in the average's weights, :math:`q`.
        maximize: ascend instead of descend.
        differentiable: run the reference backend and record it for autograd.
        backend: a name from `fasttrain.kernels.dispatch`, or None to choose.

    State: `z`; and in the group `k`, `weight_sum`, `lr_max` and `train_mode`.

    Raises:
        ValueError: a hyperparameter is out of its range.
        RuntimeError: a step in evaluation mode.

    Example:
        >>> import torch
        >>> from fasttrain.optim import ScheduleFreeSGD
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = ScheduleFreeSGD([weight], lr=0.5)
        >>> weight.grad = torch.ones(2)
        >>> optimizer.step()
        >>> weight.grad = -torch.ones(2)
        >>> optimizer.step()
        >>> optimizer.eval()  # the parameters are averages now
        >>> weight.data
        tensor([0.7500, 0.7500])
        >>> optimizer.train()  # and here they are what is trained

    Reference: arXiv 2405.15682, equations 3 to 5; weights and warmup of the authors' code.
    """

    state = ("z",)  # type: ignore[assignment]
    advancing = advancing("ScheduleFreeSGDAdvancing", lambda k, betas: 1.0)
    retain = {"z": "one"}  # noqa: RUF012
    exact = ("z",)

    @staticmethod
    def coefficients(step, k, weight_sum, lr_max, lr, warmup_steps, r, weight_lr_power, momentum, weight_decay):
        lr, share, _ = schedule(k, weight_sum, lr_max, lr, warmup_steps, r, weight_lr_power)
        return dict(decay=weight_decay, **rates(lr, share, momentum))

    @staticmethod
    def element(p, g, z, k):
        update = g + k.decay * p
        return k.stay * p + k.share * z - k.rate * update, z - k.lr * update

    def __init__(self, params, lr=1.0, momentum=0.9, weight_decay=0.0, warmup_steps=0, r=0.0, weight_lr_power=2.0, *,
                 maximize=False, differentiable=False, **options):
        check_hyperparameters(lr=lr, weight_decay=weight_decay, warmup_steps=warmup_steps)
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, warmup_steps=warmup_steps,
                                      r=r, weight_lr_power=weight_lr_power, maximize=maximize,
                                      differentiable=differentiable), **options)

    @staticmethod
    def mix(group):
        return group["momentum"]


class ScheduleFreeAdamW(ScheduleFree):
    r"""AdamW whose average is the model: no schedule of the learning rate, and no end of the run to be known.

    .. math::
        v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t(y_t)^2, \quad
        u_t = \frac{g_t(y_t)}{\sqrt{v_t} + \epsilon} + \lambda y_t, \quad
        \gamma_t = \gamma \sqrt{1 - \beta_2^t}, \quad z_{t+1} = z_t - \gamma_t u_t, \quad
        x_{t+1} = (1 - c_t)\, x_t + c_t z_{t+1}, \quad y_{t+1} = (1 - \beta_1)\, z_{t+1} + \beta_1\, x_{t+1}

    with the weights of `ScheduleFreeSGD`. The bias correction counts the group's steps, as in the authors' code.

    Arguments:
        params: parameters, named parameters, or parameter groups, as in `torch.optim.Optimizer`; float64, float32,
            bfloat16 or float16 of any shape, or complex. Gradients may have another real dtype than their parameter.
        lr: learning rate :math:`\gamma`, a float or a 0-dim tensor; one to ten times AdamW's.
        betas: :math:`(\beta_1, \beta_2)`, in [0, 1), the first above 0.
        eps: :math:`\epsilon`, added to the root of the second moment.
        weight_decay: :math:`\lambda`, of the point that gradients are taken at, added to the update.
        warmup_steps: steps in which :math:`\gamma_t` grows to its full size; 0 for none.
        r: power of the step in the average's weights, :math:`r`.
        weight_lr_power: power of the largest rate so far in the average's weights, :math:`q`.
        maximize: ascend instead of descend.
        differentiable: run the reference backend and record it for autograd.
        backend: a name from `fasttrain.kernels.dispatch`, or None to choose.

    State: `z` and `exp_avg_sq`; and in the group `k`, `weight_sum`, `lr_max` and `train_mode`.

    Raises:
        ValueError: a hyperparameter is out of its range.
        RuntimeError: a step in evaluation mode.

    Example:
        >>> import torch
        >>> from fasttrain.optim import ScheduleFreeAdamW
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = ScheduleFreeAdamW([weight], lr=0.1)
        >>> weight.grad = torch.tensor([3.0, -0.5])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000, 1.1000])

    Reference: arXiv 2405.15682, algorithm 1.
    """

    state = ("z", "exp_avg_sq")  # type: ignore[assignment]
    advancing = advancing("ScheduleFreeAdamWAdvancing", lambda k, betas: (1 - betas[1] ** Step(k + 1)) ** 0.5)
    positive = ("exp_avg_sq",)
    retain = {"z": "one", "exp_avg_sq": "b2"}  # noqa: RUF012
    exact = ("z",)

    @staticmethod
    def coefficients(step, k, weight_sum, lr_max, lr, warmup_steps, r, weight_lr_power, betas, eps, weight_decay):
        b1, b2 = betas
        root = (1 - b2 ** Step(k + 1)) ** 0.5
        lr, share, _ = schedule(k, weight_sum, lr_max, lr, warmup_steps, r, weight_lr_power, root)
        return dict(b2=b2, a2=1 - b2, eps=eps, decay=weight_decay, **rates(lr, share, b1))

    @staticmethod
    def element(p, g, z, exp_avg_sq, k):
        exp_avg_sq = k.b2 * exp_avg_sq + k.a2 * g * g
        update = g / (sqrt(exp_avg_sq) + k.eps) + k.decay * p
        return k.stay * p + k.share * z - k.rate * update, z - k.lr * update, exp_avg_sq

    def __init__(self, params, lr=0.0025, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, warmup_steps=0, r=0.0,
                 weight_lr_power=2.0, *, maximize=False, differentiable=False, **options):
        check_hyperparameters(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, warmup_steps=warmup_steps)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, warmup_steps=warmup_steps,
                                      r=r, weight_lr_power=weight_lr_power, maximize=maximize,
                                      differentiable=differentiable), **options)

    @staticmethod
    def mix(group):
        return group["betas"][0]

    @staticmethod
    def correction(group):
        return (1 - number(group["betas"][1]) ** Step(number(group["k"]) + 1)) ** 0.5
