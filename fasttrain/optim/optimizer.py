"""The face of every optimizer: `torch.optim.Optimizer` whose step is one fused pass over memory.

One step goes through four phases:

1. *Scan.* The native plan compares every parameter, gradient and state with what it knows, takes their pointers, and
   returns the few that it does not know: new ones, and ones whose dtype, layout, device or state changed. Parameters
   on other devices are compared in the same way (`fasttrain.optim.roster`).
2. *Examine.* Those are checked here, in Python, their states are made where missing, and they are described to the
   plan. What no flat loop can walk (strided views, other devices, subclasses) is kept apart as items.
3. *Coefficients*, one row for each (parameter group, step count, running numbers), in double precision.
4. *Run.* The plan is walked, items go to the backend of their device, where the tables of those that stay as they
   are stand already (`fasttrain.optim.afar`).

Nothing is written before every parameter has been examined: bad input raises and leaves all as it was, without the
states that were made on the way.

The first two phases are in `fasttrain.optim.examine`, the others in `fasttrain.optim.runs`. The class has layers, each
in a file: what a page says (`page`), the parameter groups (`groups`), state that goes out and comes back (`saved`),
what goes on around a step (`around`); and here the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fasttrain.kernels import driven
from fasttrain.kernels.item import Item
from fasttrain.kernels.prologue import Row
from fasttrain.optim import afar, drive, driven_step, offload
from fasttrain.optim.around import Around
from fasttrain.optim.equation import EQUATION
from fasttrain.optim.examine import Examined, advance, describe, examine, scan, undone
from fasttrain.optim.report import StepReport
from fasttrain.optim.runs import runs_of_items, walk_of_plan
from fasttrain.optim.saved import Saved
from fasttrain.rule import Rule


class Optimizer(Around, Saved):
    """Base of every optimizer, and of yours: an equation in the vocabulary of `fasttrain.rule`, and a constructor.

    A page (a subclass) gives `state`, `coefficients` and `element`, as described there, or its `rules`. A rule that is
    not in the compiled module is compiled at first use; see docs/optimizers.md.

    Arguments:
        params: parameters, named parameters, or parameter groups, as in `torch.optim.Optimizer`.
        defaults: hyperparameters of groups that do not give their own. Those that `coefficients` names must be there.
        options: `backend`, a name from `fasttrain.kernels.dispatch` or None to choose; `capturable`, True to have GPUs
            drive every step (docs/graphs.md); `storage`, the name of a preset of `fasttrain.precision.storage`; that
            module's options, for groups that do not give their own; `offload` and `offload_bucket` (docs/offload.md). A
            page hands on what it does not know itself.

    State: the page's states, of the parameter's dtype and shape; and `step`, a float32 count, if `counts_steps`: it is
    set where `coefficients` reads its `step`. (A page that sets it to False gets step 1 once and 2 ever after.)

    Raises:
        TypeError: the page has no equation, an incomplete one, or an option is unknown.

    Example:
        >>> import torch
        >>> from fasttrain.optim import Optimizer
        >>> class Decaying(Optimizer):
        ...     state = ()
        ...     @staticmethod
        ...     def coefficients(step, lr):
        ...         return dict(rate=lr / step)
        ...     @staticmethod
        ...     def element(p, g, k):
        ...         return p - k.rate * g
        ...     def __init__(self, params, lr=1e-3, **options):
        ...         super().__init__(params, dict(lr=lr), **options)
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = Decaying([weight], lr=1.0)
        >>> for _ in range(2):
        ...     weight.grad = torch.ones(2)
        ...     optimizer.step()
        >>> weight.data
        tensor([-1.5000, -1.5000])
    """

    def __init__(self, params, defaults, **options):
        if not self.rules:
            raise TypeError(f"{type(self).__name__} has no equation: {EQUATION}")
        self._take(options)
        torch.optim.Optimizer.__init__(self, params, defaults)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient.

        Arguments:
            closure: reevaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError, ValueError, TypeError: a parameter, gradient or state cannot be stepped; it is named, and
                nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(bool(self.defaults.get("differentiable"))):
            self._step()
        return loss

    @torch._disable_dynamo  # a compiled training step calls it as it is
    def _step(self) -> None:
        if self._swapped:
            raise RuntimeError("the parameters are their EMA (ema_weights): step after the `with` block")
        report = StepReport()
        self._vouched, self.vouched = self.vouched, None
        found = drive.places(self)
        if found and found.places and driven_step.step(self, found, drive.rules_of(self), report):
            return
        if self._drive is not None and (found is None or found.places):
            drive.leave(self)
        scale = self._scale(report)
        host = self._on_host()
        if scale is None:  # torch's GradScaler found something: skip the whole step
            self._finish(report)
            return
        if host is not None:
            host.step(scale, report)
            self._clip, self.last_step = 1.0, report
            self._arrived.clear()
            return
        self._pass(scale, report)
        self.stepped()
        self._finish(report)

    def _on_host(self) -> offload.Host | None:
        self._host = offload.current(self, self._host) if self.offload else None
        return self._host

    def _pass(self, scale: float, report: StepReport) -> None:
        """Step every parameter that has a gradient now."""
        rules = [self.rule_of(group) for group in self.param_groups]
        sparse, examined = [], []
        try:
            with undone(self) as examining:
                for index in scan(self, rules):
                    where = self._places[index]
                    p = self._param(where)
                    grad = p.grad
                    assert grad is not None
                    if grad.layout != torch.strided:
                        sparse.append((p, grad, self.param_groups[where[0]]))
                        continue
                    examining(p)
                    one = self._examine(where, rules[where[0]], report)
                    if not self._describe(index, one):
                        examined.append(one)
                walk = walk_of_plan(self, rules, scale)
                far = afar.walk(self, rules, scale)
                if far is None and self._afar is not None:  # some share memory: they are stepped one by one
                    examined += [self._examine(where, rules[where[0]], report) for where in self._afar.leave()]
                    examined.sort(key=lambda one: one.where)
                runs = self._runs_and_numbers(examined, scale, report)
                for p, grad, group in sparse:  # first: torch's function may refuse them
                    self.step_sparse(p, grad, group)
                if walk is not None:
                    walk(report)
                if far is not None:
                    far(report)
        finally:
            for one in (self._plan, self._afar):
                if one is not None:
                    one.release()
        for run in runs:
            run()

    def _step_only(self, p: Tensor) -> None:
        """Step one parameter whose gradient has arrived."""
        if drive.capturing():
            raise drive.refused(drive.NotDriven("parameters are stepped as their gradients arrive (step_on_arrival)"))
        host = self._host if self._host is not None and id(p) in self._host.number else self._on_host()
        if host is not None:
            with torch.no_grad():
                host.arrive(p, self._clip)
            self._arrived.add(id(p))
            return
        where = next((g, i) for g, group in enumerate(self.param_groups)
                     for i, other in enumerate(group["params"]) if other is p)
        with torch.no_grad():
            report = StepReport()
            with undone(self) as examining:
                examining(p)
                one = self._examine(where, self.rule_of(self.param_groups[where[0]]), report)
                runs = self._runs_and_numbers([one], self._clip, report)
            for run in runs:
                run()
        self._arrived.add(id(p))

    def _runs_and_numbers(self, examined: list[Examined], scale: float, report: StepReport) -> list[Callable[[], Any]]:
        """The runs of the parameters that are not in the plan, and after them what replaces their running numbers."""
        advanced = [advance(self, one) for one in examined]
        return [*self._runs([one for one, _ in advanced], scale, report),
                *(partial(tensor.copy_, value) for _, after in advanced for tensor, value in after)]

    # --- The phases, where a page that is no one rule over elements has its own ---------------------------------------

    def _examine(self, where: tuple[int, int], rule: Rule, report: StepReport,
                 steps_of: Callable[[Tensor, StepReport], float] | None = None) -> Examined:
        return examine(self, where, rule, report, steps_of)

    def _driven(self, items: Sequence[Item], places: Sequence[tuple[int, int]], rows: Sequence[Row],
                row_of: Sequence[int], backend: str) -> driven.Driven:
        """What steps items that a device drives; `places` are their parameters'."""
        return driven.driven(items, rows, row_of, backend)

    def _describe(self, index: int, one: Examined) -> bool:
        return describe(self, index, one) or afar.take(self, index, one)

    def _runs(self, examined: list[Examined], scale: float, report: StepReport) -> list[Callable[[], None]]:
        return runs_of_items(self, examined, scale, report)
