"""Adafactor: Shazeer and Stern (arXiv 1804.04235, algorithm 4), in torch's form."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from fasttrain.kernels import dispatch, factored
from fasttrain.optim import adafactor_parts
from fasttrain.optim.checks import number
from fasttrain.optim.itemwise import Itemwise
from fasttrain.optim.local import copied, is_dtensor, shares


class Adafactor(Itemwise, torch.optim.Adafactor):
    r"""Second moments by row and column: `torch.optim.Adafactor`, its arguments, its states and its numbers.

    .. math::
        R_t = \hat\beta_{2t} R_{t-1} + (1-\hat\beta_{2t})\, \mathrm{mean}_{cols}(g_t^2), \quad
        C_t = \hat\beta_{2t} C_{t-1} + (1-\hat\beta_{2t})\, \mathrm{mean}_{rows}(g_t^2), \quad
        \hat\beta_{2t} = 1 - t^{\tau}

    .. math::
        \hat V_t = \frac{R_t C_t}{\max(\mathrm{mean}(R_t), \epsilon_1)}, \quad
        U_t = \frac{g_t}{\max(\sqrt{\hat V_t}, \epsilon_1)}, \quad
        \theta_t = (1-\eta\lambda)\,\theta_{t-1} - \max(\epsilon_2, \mathrm{RMS}(\theta_{t-1}))\,
            \min(\eta, 1/\sqrt{t})\, \frac{U_t}{\max(1, \mathrm{RMS}(U_t)/d)}

    Arguments:
        params: parameters, named parameters, or parameter groups, as in `torch.optim.Optimizer`; float64, float32,
            bfloat16 or float16. With two and more dimensions the last two are factored; others keep all of V.
        lr: the largest relative step size :math:`\eta`, a float or a 0-dim tensor.
        beta2_decay: :math:`\tau`, at most 0.
        eps: :math:`(\epsilon_1, \epsilon_2)`; None for the first takes the machine epsilon of the parameter's dtype.
        d: clipping threshold of the update's root mean square, at least 1.
        weight_decay: :math:`\lambda`; the parameter shrinks by :math:`1 - \eta\lambda` before the update.
        foreach: accepted for torch's sake; every step here is fused.
        maximize: ascend instead of descend.
        backend: a name from `fasttrain.kernels.dispatch`, or None to choose. In CPU memory a step makes three passes
            (24 bytes an element in fp32, from the cache where a parameter fits it); CUDA takes six launches, Triton
            eight.

    Sharded parameters (DTensor): sums by row and by column are added over the parts, 8 (rows + columns + 3) bytes for
    a matrix, those of all parameters in one collective of two a step; `row_var` and `col_var` are whole on every
    process. Shards run in eager torch.

    State: `step`, and `row_var` and `col_var` or `variance`, as torch keeps them.

    Raises:
        ValueError: a hyperparameter is out of its range (torch's own texts).
        RuntimeError: a parameter is complex, a gradient sparse, or missing on some of the processes that share it.

    Example:
        >>> import torch
        >>> from fasttrain.optim import Adafactor
        >>> weight = torch.nn.Parameter(torch.ones(2, 3))
        >>> optimizer = Adafactor([weight], lr=0.1)
        >>> weight.grad = torch.ones(2, 3)
        >>> optimizer.step()
        >>> weight.data
        tensor([[0.9000, 0.9000, 0.9000],
                [0.9000, 0.9000, 0.9000]])

    Reference: arXiv 1804.04235, algorithm 4.
    """

    counts_steps = True

    def __init__(self, params, lr=1e-2, beta2_decay=-0.8, eps=(None, 1e-3), d=1.0, weight_decay=0.0, *, foreach=None,
                 maximize=False, **options):
        self._take(options)
        torch.optim.Adafactor.__init__(self, params, lr, beta2_decay, eps, d, weight_decay, foreach=foreach,
                                       maximize=maximize)

    def loaded_shapes(self, p, group):
        if p.dim() < 2:
            return {"step": None, "variance": tuple(p.shape)}
        return {"step": None, "row_var": (*p.shape[:-1], 1), "col_var": (*p.shape[:-2], 1, p.shape[-1])}

    def rule_of(self, group):
        return None  # it is none: see fasttrain.kernels.factored

    def init_state(self, p, group, rule):
        made = not self.state[p]
        if made:
            self._init_group({**group, "params": [p]}, [], [], [], [], [], [])
            for key in ("row_var", "col_var"):
                if shares(kept := self.state[p].get(key)):  # of a matrix of one column, which is cut as that
                    self.state[p][key] = copied(torch.zeros(kept.shape, dtype=kept.dtype, device=kept.device), p)
        return made

    def step_sparse(self, p, grad, group):
        raise RuntimeError("Adafactor does not support sparse gradients")

    # --- The step -----------------------------------------------------------------------------------------------------

    def _refuse(self, p):
        if p.is_complex():
            raise RuntimeError("Adafactor does not support complex parameters")

    def _states(self, name, p, rule):
        wanted = {"row_var": (*p.shape[:-1], 1), "col_var": (*p.shape[:-2], 1, p.shape[-1])} if p.dim() > 1 else \
            {"variance": tuple(p.shape)}
        for key, shape in wanted.items():
            kept = self.state[p].get(key)
            if key != "variance" and shares(kept):  # loaded
                kept = self.state[p][key] = copied(kept.full_tensor(), p)
            if not isinstance(kept, torch.Tensor) or kept.shape != shape or kept.device != p.device:
                found = f"{tuple(kept.shape)} on {kept.device}" if isinstance(kept, torch.Tensor) else "missing"
                raise RuntimeError(f"{name}: its state {key!r} is {found}, and must be of shape {shape} on {p.device}; "
                                   "delete optimizer.state[p] to start it afresh")
        return tuple(wanted)

    def _runs(self, examined, scale, report):
        """One run for each backend in use, and one for what is shared with other processes."""
        chosen: dict[Any, Any] = {}
        rows: dict[Any, Any] = {}
        shared: dict[tuple[int, int], factored.Work] = {}
        wholes = []
        for one in examined:
            item, step, group = one.item, one.step, one.group
            p = self._param(one.where)
            report.count(item)
            dtype, device = item.tensors[0].dtype, item.tensors[0].device
            key = id(group), step, dtype
            if key not in rows:
                rows[key] = self._numbers(group, step, dtype, scale)
            if shares(p):
                shared[one.where] = item, rows[key]
                continue
            if device not in chosen:
                chosen[device] = dispatch.choose(device, self.backend), []
            chosen[device][1].append((item, rows[key]))
            if is_dtensor(p):
                wholes.append(p)
        report.launches += sum(factored.launches(work, backend) for backend, work in chosen.values()) + bool(shared)
        runs = [partial(factored.step, work, backend) for backend, work in chosen.values()]
        if meeting := self._meeting(examined):
            parts = [adafactor_parts.Shared(self._name(where), self._param(where), shared.get(where))
                     for where in meeting]
            report.host_syncs += parts[0].p.device.type != "cpu"
            runs.append(partial(adafactor_parts.step, parts, adafactor_parts.measured(parts)))
        return [*runs, partial(torch.autograd.graph.increment_version, wholes)] if wholes else runs

    @staticmethod
    def _numbers(group, step, dtype, scale):
        """The row of `fasttrain.kernels.factored`."""
        lr, beta2_decay, d, weight_decay = (number(group[key]) for key in ("lr", "beta2_decay", "d", "weight_decay"))
        eps1, eps2 = number(group["eps"])
        return (-scale if group["maximize"] else scale, 1 - lr * weight_decay, step**beta2_decay,
                min(lr, 1 / step**0.5), torch.finfo(dtype).eps if eps1 is None else eps1, eps2, d)
