"""Muon: Jordan et al. (2024), momentum orthogonalised by Newton-Schulz; Liu et al. (arXiv 2502.16982) for its scaling.

Two rules with matrix products between them: the momentum is written to bfloat16 workspaces, one for all parameters of
a shape, the workspaces are orthogonalised batch by batch, and the result is applied with decoupled weight decay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fasttrain.kernels import dispatch
from fasttrain.kernels.item import Item, in_turns
from fasttrain.optim.adamw import DECOUPLED
from fasttrain.optim.itemwise import Itemwise
from fasttrain.optim.local import gathered, is_dtensor, part_of
from fasttrain.optim.muon_driven import MuonDriven
from fasttrain.optim.muon_shapes import adjustment, matrices
from fasttrain.optim.newton_schulz import orthogonalize
from fasttrain.optim.optimizer import Optimizer
from fasttrain.optim.page import Group
from fasttrain.optim.workspace import Workspace
from fasttrain.rule import Rule

BATCH = 1 << 24  # elements that are orthogonalised together, at most (or one parameter): what bounds the workspace
BATCH_ON_GPU = 1 << 26  # enough tiles that few processors wait for the last ones


def momentum_coefficients(step, momentum):
    return dict(keep=momentum, add=1 - momentum)


def heavy_ball(update, g, momentum_buffer, k):
    momentum_buffer = k.keep * momentum_buffer + k.add * g
    return momentum_buffer, momentum_buffer


def nesterov(update, g, momentum_buffer, k):
    momentum_buffer = k.keep * momentum_buffer + k.add * g
    return k.add * g + k.keep * momentum_buffer, momentum_buffer


def apply_coefficients(step, lr, weight_decay, ratio):
    return dict(keep=1 - lr * weight_decay, rate=lr * ratio)


def apply(p, update, k):
    return k.keep * p - k.rate * update


RETAIN = {"momentum_buffer": "keep"}
MOMENTUM = Rule("MuonMomentum", ("momentum_buffer",), momentum_coefficients, heavy_ball, retain=RETAIN)
NESTEROV = Rule("MuonNesterov", ("momentum_buffer",), momentum_coefficients, nesterov, retain=RETAIN)
APPLY = Rule("MuonApply", (), apply_coefficients, apply)


def in_batches(chosen: Sequence[tuple[Item, Group, Tensor]]) -> list[tuple[tuple[Any, ...], list[int]]]:
    """What the matrices of a batch have in common, and the places of its items."""
    batches: dict[Any, list[list[int]]] = {}
    for place, (item, group, p) in enumerate(chosen):
        if p.numel():
            key = (matrices(p, group)[1:], item.dtype, p.device, tuple(map(float, group["ns_coefficients"])),
                   group["ns_steps"], group["eps"])
            together = batches.setdefault(key, [[]])
            most = BATCH if p.device.type == "cpu" else BATCH_ON_GPU
            if together[-1] and sum(chosen[other][2].numel() for other in together[-1]) + p.numel() > most:
                together.append([])
            together[-1].append(place)
    return [(key, places) for key, together in batches.items() for places in together]


class Muon(Itemwise, torch.optim.Muon):
    r"""Momentum with orthogonalised updates: `torch.optim.Muon`, and AdamW for what is not a matrix.

    .. math::
        b_t = \mu b_{t-1} + (1-\mu) g_t, \quad
        u_t = b_t \ \text{or (Nesterov)} \ (1-\mu) g_t + \mu b_t, \quad
        \theta_t = (1-\eta\lambda)\,\theta_{t-1} - \eta\, s\; \mathrm{NS}(u_t)

    where NS takes a matrix near its orthogonal factor, in bfloat16, and s scales by the matrix's shape.

    Arguments:
        params: parameters, named parameters, or parameter groups, as in `torch.optim.Optimizer`; float64, float32,
            bfloat16 or float16. Those of two and more dimensions go to Muon. Those of fewer, and all of a group with
            `use_muon=False` (embeddings and heads, as Muon's authors advise), go to AdamW; complex ones must.
        lr: learning rate :math:`\eta`, a float or a 0-dim tensor.
        weight_decay: :math:`\lambda`; the parameter shrinks by :math:`1 - \eta\lambda` before the update.
        momentum: :math:`\mu`.
        nesterov: look ahead.
        ns_coefficients: (a, b, c) of the iteration.
        eps: the least norm to divide a matrix by.
        ns_steps: iterations, fewer than 100.
        adjust_lr_fn: s: "original" (or None), Jordan's sqrt(max(1, rows / columns)); or "match_rms_adamw", Moonlight's
            0.2 sqrt(max(rows, columns)), with which AdamW's learning rate and weight decay can be used.
        use_muon: False gives every parameter to AdamW; meant for a parameter group.
        flatten: take a parameter of three and more dimensions as one matrix, its first dimension by all others (the
            filters of a convolution), not as a batch of matrices over its leading dimensions (one for each expert).
        heads: matrices that lie on top of one another in a parameter of two dimensions (one for each attention head).
        maximize: ascend instead of descend.
        adamw_lr, adamw_weight_decay: AdamW's; None takes the group's `lr` and `weight_decay`. Schedulers move `lr`.
        adamw_betas, adamw_eps: AdamW's.
        backend: a name from `fasttrain.kernels.dispatch`, or None to choose. With "reference" all matrix products are
            torch's; else, on GPUs, Triton computes the symmetric ones (`fasttrain.kernels.symmetric`).

    Sharded parameters (DTensor): the momentum is stepped shard by shard; the updates are gathered in bfloat16, one
    parameter after the other, at most a batch at a time, each rank orthogonalises all of them, and applies its part.
    The same bits as unsharded, where the products have the same for the same batch.

    State: `momentum_buffer`, as torch keeps it; under AdamW `step`, `exp_avg` and `exp_avg_sq`.

    Raises:
        ValueError: a hyperparameter is out of its range (torch's own texts), or `heads` does not divide the rows.
        RuntimeError: a gradient is sparse, or complex.

    Example:
        >>> import torch
        >>> from fasttrain.optim import Muon
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 10))
        >>> optimizer = Muon([{"params": model[1].parameters()},
        ...                   {"params": [model[0].weight, *model[2].parameters()], "use_muon": False, "lr": 3e-4}],
        ...                  lr=0.02, momentum=0.95)
        >>> model(torch.arange(10)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model[1].weight]), sorted(optimizer.state[model[1].bias])
        (['momentum_buffer'], ['exp_avg', 'exp_avg_sq', 'step'])

    Reference: Jordan et al., Muon: an optimizer for hidden layers in neural networks (2024); arXiv 2502.16982,
        section 2.2.
    """

    rules = (MOMENTUM, NESTEROV, APPLY, DECOUPLED)
    counts_steps = True
    _workspace: Workspace | None = None

    def __init__(self, params, lr=1e-3, weight_decay=0.1, momentum=0.95, nesterov=True,
                 ns_coefficients=(3.4445, -4.7750, 2.0315), eps=1e-7, ns_steps=5, adjust_lr_fn=None, *, use_muon=True,
                 flatten=False, heads=1, maximize=False, adamw_lr=None, adamw_betas=(0.9, 0.95), adamw_eps=1e-8,
                 adamw_weight_decay=None, **options):
        one = [torch.empty(1, 1)]  # torch's constructors check hyperparameters, and here theirs refuse n-d parameters
        defaults = torch.optim.Muon(one, lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps,
                                    adjust_lr_fn).defaults
        torch.optim.AdamW(one, lr if adamw_lr is None else adamw_lr, adamw_betas, adamw_eps,
                          weight_decay if adamw_weight_decay is None else adamw_weight_decay)
        if ns_steps >= 100:
            raise ValueError("Number of steps must be less than 100 for computational efficiency")
        if len(ns_coefficients) != 3:
            raise ValueError("Coefficients must be a tuple of exactly 3 values")
        super().__init__(params, {**defaults, "use_muon": use_muon, "flatten": flatten, "heads": heads,
                                  "maximize": maximize, "adamw_lr": adamw_lr, "adamw_betas": adamw_betas,
                                  "adamw_eps": adamw_eps, "adamw_weight_decay": adamw_weight_decay}, **options)

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        number, group = len(self.param_groups) - 1, self.param_groups[-1]
        for index, p in enumerate(group["params"]):
            if p.dim() == 2 and group["use_muon"] and (group["heads"] < 1 or p.shape[0] % group["heads"]):
                message = f"{self._name((number, index))} has {p.shape[0]} rows, which are no {group['heads']} heads"
                self.param_groups.pop()
                raise ValueError(message)

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:  # those of torch's checkpoints lack ours
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    def loaded_shapes(self, p, group):
        if p.dim() < 2 or not group["use_muon"]:
            return {"step": None, "exp_avg": tuple(p.shape), "exp_avg_sq": tuple(p.shape)}
        return {"momentum_buffer": tuple(p.shape)}

    def rule_of(self, group):
        return DECOUPLED if not group["use_muon"] else NESTEROV if group["nesterov"] else MOMENTUM

    def init_state(self, p, group, rule):
        state = self.state[p]
        if rule is not DECOUPLED:
            made = "momentum_buffer" not in state
            if made:
                state["momentum_buffer"] = torch.zeros_like(p.grad, memory_format=torch.preserve_format)
            return made
        made = not state
        if made:
            state["step"] = torch.zeros((), dtype=torch.get_default_dtype())
        return super().init_state(p, group, rule) or made

    def takes_storage(self, group):
        return not group["use_muon"]

    def step_sparse(self, p, grad, group):
        raise RuntimeError("Muon does not support sparse gradients")

    # --- The step -----------------------------------------------------------------------------------------------------

    def _counts(self, rule):
        return rule is DECOUPLED

    def _refuse(self, p):
        if p.is_complex():
            raise RuntimeError("Muon does not support complex parameters")

    def _examine(self, where, rule, report, steps_of=None):
        if rule is DECOUPLED or self._param(where).dim() < 2:
            return Optimizer._examine(self, where, DECOUPLED, report, steps_of)
        return super()._examine(where, rule, report)

    def not_driven(self):
        matrices = [p for group in self.param_groups if group["use_muon"] for p in group["params"]]
        return "Muon gathers matrices that are cut into shards" if any(map(is_dtensor, matrices)) else None

    def _driven(self, items, places, rows, row_of, backend):
        plain, rest = ([place for place, item in enumerate(items) if (item.rule is DECOUPLED) == adam]
                       for adam in (True, False))
        groups = [self.param_groups[group] for group, _ in places]
        matrices = [(items[place], groups[place], items[place].tensors[0]) for place in rest]
        batches = [([rest[one] for one in own], key[0], key[3:]) for key, own in in_batches(matrices)]
        return MuonDriven(self, APPLY, items, groups, rows, row_of, plain, batches,
                          lambda group, *shape: adjustment(group["adjust_lr_fn"], *shape), backend)

    def _describe(self, index, one):
        group = self.param_groups[self._places[index][0]]
        return not group["use_muon"] and Optimizer._describe(self, index, one)

    def _hyperparameters(self, rule, group):
        if rule is DECOUPLED:
            lr, decay = group["adamw_lr"], group["adamw_weight_decay"]
            group = {**group, "betas": group["adamw_betas"], "eps": group["adamw_eps"],
                     "lr": group["lr"] if lr is None else lr,
                     "weight_decay": group["weight_decay"] if decay is None else decay}
        return super()._hyperparameters(rule, group)

    def _runs(self, examined, scale, report):
        """AdamW's items, and one run for each batch of matrices of one shape and the same options."""
        plain = [one for one in examined if one.item.rule is DECOUPLED]
        rest = [(one.item, one.group, self._param(one.where)) for one in examined if one.item.rule is not DECOUPLED]
        return [*super()._runs(plain, scale, report),
                *(self._batch(key, [rest[place] for place in places], scale) for key, places in in_batches(rest))]

    def _batch(self, key, batch, scale):
        (rows, columns), dtype, device, coefficients, steps, eps = key
        chosen = dispatch.choose(device, self.backend)
        backend = dispatch.load(chosen)
        kept = torch.float64 if dtype == torch.float64 else torch.bfloat16  # in which the rule writes the update
        moved = [self._row(item.rule, group, 1, scale) for item, group, _ in batch]
        applied = [self._row(APPLY, {**group, "maximize": False,
                                     "ratio": adjustment(group["adjust_lr_fn"], rows, columns)}, 1, 1.0)
                   for _, group, _ in batch]
        params, wholes = [item.tensors[0] for item, *_ in batch], [whole for *_, whole in batch]
        elements, shards = [whole.numel() for whole in wholes], [whole for whole in wholes if is_dtensor(whole)]

        def run():
            space = self._workspace = self._workspace or Workspace()
            updates = space.take("update", (sum(elements),), kept, device)
            parts = [part.view(whole.shape) for part, whole in zip(updates.split(elements), wholes, strict=True)]
            mine = [torch.empty_like(p, dtype=kept) if is_dtensor(whole) else part
                    for p, whole, part in zip(params, wholes, parts, strict=True)]
            self._step_all(backend, [replace(item, row=row, tensors=(part, *item.tensors[1:]))
                                     for (item, *_), row, part in zip(batch, moved, mine, strict=True)])
            for whole, part, own in zip(wholes, parts, mine, strict=True):
                if is_dtensor(whole):
                    part.copy_(gathered(own, whole))
            x = updates.bfloat16().view(-1, rows, columns)
            x = orthogonalize(x, coefficients, steps, eps, space, chosen).view(-1)
            parts = [part_of(part.view(whole.shape), whole)
                     for part, whole in zip(x.split(elements), wholes, strict=True)]
            self._step_all(backend, [Item(item.name, APPLY, (p, part), row, None)
                                     for (item, *_), p, row, part in zip(batch, params, applied, parts, strict=True)])
            torch.autograd.graph.increment_version(shards)
        return run

    @staticmethod
    def _step_all(backend, items):
        for together in in_turns(items):
            backend.step(together)
