"""SOAP: Vyas et al., Improving and Stabilizing Shampoo using Adam (arXiv 2409.11321, algorithm 3).

The details are those of its authors' code.

Adam, in the eigenbasis of Shampoo's preconditioners. Products, eigenvectors and QR are torch's; what Adam does to an
element, and the update of the parameter, are rules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from fasttrain.kernels import dispatch
from fasttrain.kernels.item import Item
from fasttrain.optim.adamw import POSITIVE, RETAIN, STATE, moments
from fasttrain.optim.checks import check_hyperparameters
from fasttrain.optim.itemwise import Itemwise
from fasttrain.optim.local import check_given, gathered, is_dtensor, part_of, shares, totals_of_parts
from fasttrain.optim.workspace import Workspace
from fasttrain.rule import Rule, sqrt


def adam_coefficients(step, betas, eps):
    b1, b2 = betas
    return dict(b1=b1, a1=1 - b1, b2=b2, a2=1 - b2, eps=eps)


def adam(update, g, exp_avg, exp_avg_sq, k):
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, k)
    return exp_avg / (sqrt(exp_avg_sq) + k.eps), exp_avg, exp_avg_sq


def apply_coefficients(step, lr, betas, weight_decay, correct_bias):
    b1, b2 = betas
    correct = (1 - b2**step) ** 0.5 / (1 - b1**step) if correct_bias else 1.0
    return dict(rate=lr * correct, keep=1 - lr * weight_decay)


def apply(p, update, k):
    return k.keep * (p - k.rate * update)


ADAM = Rule("SOAPAdam", STATE, adam_coefficients, adam, POSITIVE, RETAIN)
APPLY = Rule("SOAPApply", (), apply_coefficients, apply)
ROLES = ("gradient", "turned", "turned again", "update")  # of a parameter's size in the workspace


def merged(shape: Sequence[int], largest: int) -> tuple[int, ...]:
    """A shape whose neighbouring dimensions are joined as far as their product is at most `largest`.

    >>> merged((8, 3, 5, 5), 75), merged((2, 3), 100), merged((50, 4, 3), 20)
    ((24, 25), (6,), (50, 12))
    """
    joined: list[int] = []
    current = 1
    for size in shape:
        if current * size <= largest:
            current *= size
        elif current > 1:
            joined.append(current)
            current = size
        else:
            joined.append(size)
    return (*joined, current) if current > 1 or not joined else tuple(joined)


def viewed(shape: Sequence[int], group: Mapping[str, object]) -> tuple[tuple[int, ...], list[int]]:
    """The shape in which a parameter is preconditioned, and those of its dimensions that are."""
    largest = int(group["max_precond_dim"])  # type: ignore[call-overload]
    if len(shape) < 2:
        return tuple(shape), [i for i, size in enumerate(shape) if group["precondition_1d"] and size <= largest]
    shape = merged(shape, largest) if group["merge_dims"] else tuple(shape)
    return shape, [i for i, size in enumerate(shape) if size <= largest]


def rotated(x: Tensor, bases: Mapping[int, Tensor], space: Workspace, back: bool = False) -> Tensor:
    """A contiguous tensor in the bases given for some of its dimensions (their columns), or back from them.

    Returns:
        The result, in the workspace until the next call but one on it; x itself if there are no bases.
    """
    for dim, basis in bases.items():
        before, size, after = math.prod(x.shape[:dim]), x.shape[dim], math.prod(x.shape[dim + 1:])
        other = space.take("turned", x.shape, x.dtype, x.device)
        if other.data_ptr() == x.data_ptr():
            other = space.take("turned again", x.shape, x.dtype, x.device)
        if after == 1:
            torch.mm(x.view(before, size), basis.mT if back else basis, out=other.view(before, size))
        else:
            left = (basis if back else basis.mT).expand(before, size, size)
            torch.bmm(left, x.view(before, size, after), out=other.view(before, size, after))
        x = other
    return x


def gram(g: Tensor, dim: int, space: Workspace) -> Tensor:
    """The products of a tensor's slices along one dimension with one another: its unfolding times the transpose."""
    size = g.shape[dim]
    unfolded = space.take("turned", (size, g.numel() // size), g.dtype, g.device)
    unfolded.view(size, *g.shape[:dim], *g.shape[dim + 1:]).copy_(g.movedim(dim, 0))
    return torch.mm(unfolded, unfolded.mT, out=space.take("gram", (size, size), g.dtype, g.device))


class SOAP(Itemwise):
    r"""Adam in the eigenbasis of Shampoo's preconditioners.

    For a matrix G with preconditioners L and R, whose eigenvectors are the columns of Q_L and Q_R:

    .. math::
        G'_t = Q_L^\top G_t Q_R, \quad m_t = \beta_1 m_{t-1} + (1-\beta_1) G'_t, \quad
        v_t = \beta_2 v_{t-1} + (1-\beta_2) G'^2_t

    .. math::
        \theta_t = (1-\eta\lambda) \Bigl(\theta_{t-1} - \eta\, \frac{\sqrt{1-\beta_2^t}}{1-\beta_1^t}\,
            Q_L \frac{m_t}{\sqrt{v_t} + \epsilon} Q_R^\top\Bigr), \quad
        L_t = \beta L_{t-1} + (1-\beta) G_t G_t^\top, \quad R_t = \beta R_{t-1} + (1-\beta) G_t^\top G_t

    Every few steps the bases take one step of orthogonal iteration, Q = QR(L Q), their columns in the order of the
    eigenvalues; m is turned into the new basis. The first gradient of a parameter only starts the preconditioners: it
    takes no step, as in the authors' code, whose weight decay also comes after the update.

    Arguments:
        params: parameters, named parameters, or parameter groups, as in `torch.optim.Optimizer`; float64, float32,
            bfloat16 or float16 of any number of dimensions, each with a preconditioner.
        lr: learning rate :math:`\eta`, a float or a 0-dim tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        shampoo_beta: :math:`\beta`; negative takes :math:`\beta_2`.
        eps: :math:`\epsilon`, added to the root of the second moment.
        weight_decay: :math:`\lambda`.
        precondition_frequency: steps from one change of the bases to the next.
        max_precond_dim: larger dimensions have no preconditioner.
        merge_dims: join neighbouring dimensions as far as their product is at most `max_precond_dim`.
        precondition_1d: vectors have a preconditioner too; otherwise they are stepped by Adam.
        normalize_grads: divide the update by its root mean square.
        correct_bias: correct the bias of the moments.
        maximize: ascend instead of descend.
        backend: a name from `fasttrain.kernels.dispatch`, or None to choose; the matrix products are torch's.

    A workspace of four times the largest parameter and once the largest preconditioner is allocated at the first step;
    after it only torch's QR and what orders its columns allocate, and collectives.

    Sharded parameters (DTensor): the moments are cut as their parameter, the bases are on every rank. Of one parameter
    after the other the gradient and the update in the eigenbasis are gathered, 4 bytes an element each (a gradient of
    16 bits: 2), and every rank computes the products; when the bases change, both moments, 8 bytes. The same bits as
    unsharded, where torch's products have the same.

    State: `step` (updates made), `exp_avg` and `exp_avg_sq` in the eigenbasis, and `GG_i` and `Q_i` for each dimension
    i that is preconditioned; float32 for 16-bit parameters.

    Raises:
        ValueError: a hyperparameter is out of its range.
        RuntimeError: a parameter is complex, a gradient sparse, or missing on some of the processes that share it.

    Example:
        >>> import torch
        >>> from fasttrain.optim import SOAP
        >>> weight = torch.nn.Parameter(torch.ones(2, 2))
        >>> optimizer = SOAP([weight], lr=0.1, weight_decay=0.0)
        >>> weight.grad = torch.diag(torch.tensor([3.0, -0.5]))
        >>> optimizer.step()  # the preconditioners begin
        >>> optimizer.step()
        >>> weight.data
        tensor([[0.9000, 1.0000],
                [1.0000, 1.1000]])

    Reference: arXiv 2409.11321, algorithm 3.
    """

    rules = (ADAM, APPLY)
    counts_steps = True
    _workspace: Workspace | None = None

    def __init__(self, params, lr=3e-3, betas=(0.95, 0.95), shampoo_beta=-1.0, eps=1e-8, weight_decay=0.01,
                 precondition_frequency=10, max_precond_dim=10_000, merge_dims=False, precondition_1d=False,
                 normalize_grads=False, correct_bias=True, *, maximize=False, **options):
        check_hyperparameters(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        if not shampoo_beta < 1.0:
            raise ValueError(f"Invalid shampoo_beta value: {shampoo_beta}")
        if precondition_frequency < 1:
            raise ValueError(f"Invalid precondition_frequency value: {precondition_frequency}")
        super().__init__(params, dict(lr=lr, betas=betas, shampoo_beta=shampoo_beta, eps=eps,
                                      weight_decay=weight_decay, precondition_frequency=precondition_frequency,
                                      max_precond_dim=max_precond_dim, merge_dims=merge_dims,
                                      precondition_1d=precondition_1d, normalize_grads=normalize_grads,
                                      correct_bias=correct_bias, maximize=maximize), **options)

    def loaded_shapes(self, p, group):
        shape, dims = viewed(p.shape, group)
        square = {f"{name}_{dim}": (shape[dim], shape[dim]) for dim in dims for name in ("GG", "Q")}
        return {"step": None, "exp_avg": tuple(p.shape), "exp_avg_sq": tuple(p.shape), **square}

    def init_state(self, p, group, rule):
        state = self.state[p]
        made = not state
        if made:
            dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
            for name, shape in self.loaded_shapes(p, group).items():
                if name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)
                else:
                    state[name] = torch.zeros((), dtype=torch.float32) if shape is None else \
                        torch.zeros(shape, dtype=dtype, device=p.device)
        return made

    def _refuse(self, p):
        if p.is_complex():
            raise RuntimeError("SOAP does not support complex parameters")

    def _states(self, name, p, rule):
        group = next(group for group in self.param_groups if any(p is other for other in group["params"]))
        for key, shape in self.loaded_shapes(p, group).items():
            kept = self.state[p].get(key)
            if not isinstance(kept, Tensor) or (shape is not None and kept.shape != shape):
                found = f"of shape {tuple(kept.shape)}" if isinstance(kept, Tensor) else "missing"
                raise RuntimeError(f"{name}: its state {key!r} is {found}, and must be of shape {shape}; did an option "
                                   "change? delete optimizer.state[p] to start it afresh")
        return super()._states(name, p, rule)

    def _runs(self, examined, scale, report):
        for one in examined:
            report.count(one.item)
        report.launches += 2 * sum(not one.fresh for one in examined)
        if meeting := self._meeting(examined):
            params, here = [self._param(where) for where in meeting], {one.where for one in examined}
            given = totals_of_parts(params, [torch.tensor([float(where in here)], dtype=torch.float64, device=p.device)
                                             for where, p in zip(meeting, params, strict=True)])
            report.host_syncs += params[0].device.type != "cpu"
            check_given([(self._name(where), p) for where, p in zip(meeting, params, strict=True)],
                        [count.item() for count in given], "SOAP gathers it")
        runs = [partial(self._step_one, one, -scale if one.group["maximize"] else scale, report) for one in examined]
        if wholes := [p for one in examined if is_dtensor(p := self._param(one.where))]:
            runs.append(partial(torch.autograd.graph.increment_version, wholes))
        return runs

    def _step_one(self, one, scale, report):
        group, item, whole = one.group, one.item, self._param(one.where)
        if whole.numel() == 0:
            return
        state, cut = self.state[whole], shares(whole)
        p, g, exp_avg, exp_avg_sq = item.tensors
        space = self._workspace = self._workspace or Workspace()
        made = space.made
        shape, dims = viewed(whole.shape, group)
        if one.fresh:  # all that steps to come take
            for role in ROLES:
                space.take(role, whole.shape, item.dtype, p.device)
        gradient = space.take("gradient", whole.shape, item.dtype, p.device)
        gradient.copy_(gathered(g, whole) if cut else g).mul_(scale)
        g = gradient.view(shape)
        bases = {dim: state[f"Q_{dim}"] for dim in dims}
        if not one.fresh:
            step = dispatch.load(dispatch.choose(p.device, self.backend)).step
            projected = part_of(rotated(g, bases, space).view(whole.shape), whole)
            update = space.take("update", p.shape, item.dtype, p.device)
            plain = {**group, "maximize": False}
            row = self._row(ADAM, plain, one.step, 1.0)
            step([Item(item.name, ADAM, (update, projected, exp_avg, exp_avg_sq), row, item.counter)])
            update = gathered(update, whole) if cut else update
            update = rotated(update.reshape(shape), bases, space, back=True).view(whole.shape)
            if group["normalize_grads"]:
                update.div_(torch.linalg.vector_norm(update) / math.sqrt(update.numel()) + 1e-30)
            row = self._row(APPLY, plain, one.step, 1.0)
            step([Item(item.name, APPLY, (p, part_of(update, whole)), row, None)])
        beta = group["shampoo_beta"] if group["shampoo_beta"] >= 0 else group["betas"][1]
        for dim in dims:
            state[f"GG_{dim}"].lerp_(gram(g, dim, space), 1 - float(beta))
        if one.fresh:
            for dim, basis in bases.items():  # once for each parameter: in float64, which fails on fewer matrices
                basis.copy_(torch.linalg.eigh(state[f"GG_{dim}"].double())[1].flip(1))
        elif one.step % group["precondition_frequency"] == 0 and bases:
            self._turn(state, whole, shape, bases, (exp_avg, exp_avg_sq), space)
        report.allocations += space.made - made

    @staticmethod
    def _turn(state, whole, shape, bases, moments, space):
        """One step of orthogonal iteration; the moments follow the bases."""
        first, second = (gathered(moment, whole) if shares(whole) else moment for moment in moments)
        straight = rotated(first.reshape(shape), bases, space, back=True)
        second = second.reshape(shape)
        for (dim, basis), role in zip(bases.items(), cycle(("gradient", "update")), strict=False):  # both have served
            product = space.take("gram", basis.shape, basis.dtype, basis.device)
            torch.mm(state[f"GG_{dim}"], basis, out=product)
            places = torch.argsort((basis * product).sum(0), descending=True)  # by estimated eigenvalue
            second = torch.index_select(second, dim, places, out=space.take(role, shape, second.dtype, second.device))
            basis.copy_(torch.linalg.qr(product[:, places])[0])
        moments[1].copy_(part_of(second.reshape(whole.shape), whole))
        moments[0].copy_(part_of(rotated(straight, bases, space).view(whole.shape), whole))
