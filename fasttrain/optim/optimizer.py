"""The face of every optimizer: `torch.optim.Optimizer` whose step is one fused pass over memory.

One step goes through four phases:

1. *Scan.* The native plan compares every parameter, gradient and state with what it knows, takes their pointers, and
   returns the few that it does not know: new ones, and ones whose dtype, layout, device or state changed.
2. *Examine.* Those are checked here, in Python, their states are made where missing, and they are described to the
   plan. What no flat loop can walk (strided views, other devices, subclasses) is kept apart as items.
3. *Coefficients*, one row for each (parameter group, step count), in double precision.
4. *Run.* The plan is walked, items go to the backend of their device.

Nothing is written before every parameter has been examined: bad input raises and leaves all as it was, without the
states that were made on the way.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fasttrain.kernels import dispatch, native, reference
from fasttrain.kernels.item import Item, in_turns, table_of_rows
from fasttrain.kernels.trace import trace
from fasttrain.optim.checks import check_counter, check_gradient, number, plain, reals
from fasttrain.rule import Rule

Group = dict[str, Any]


class Optimizer(torch.optim.Optimizer):
    """Base of every optimizer. A page gives its equation (`state`, `coefficients`, `element`) or its `rules`.

    Arguments:
        params: parameters, named parameters, or parameter groups, as in `torch.optim.Optimizer`.
        defaults: hyperparameters of groups that do not give their own.
        options: `backend`, a name from `fasttrain.kernels.dispatch` or None to choose. A page hands on what it does
            not know itself.
    """

    rules: tuple[Rule, ...] = ()
    counts_steps = False  # whether the optimizer's state has torch's `step`
    backend: str | None = None
    _plan: Any = None
    _planned_for: tuple[list[Rule], str | None] | None = None  # the rule of each group, and the backend that is forced
    _loading: Mapping[str, Any] | None = None

    def __init__(self, params, defaults, **options):
        self._take(options)
        torch.optim.Optimizer.__init__(self, params, defaults)

    def _take(self, options: dict[str, Any]) -> None:
        """Keep the options that every optimizer has. Before torch's constructor, which adds the parameter groups."""
        self.backend = options.pop("backend", None)
        if options:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(map(repr, options))}")

    # --- What a page may say differently ------------------------------------------------------------------------------

    def rule_of(self, group: Group) -> Rule:
        """The rule that the options of a group select."""
        return self.rules[0]

    def init_state(self, p: Tensor, group: Group, rule: Rule) -> bool:
        """Make the states that `p` lacks; True if any was made."""
        missing = [name for name in rule.state if self.state[p].get(name) is None]
        for name in missing:
            self.state[p][name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return bool(missing)

    def step_sparse(self, p: Tensor, grad: Tensor, group: Group) -> None:
        """Step a parameter whose gradient is sparse."""
        raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")

    # --- The step -----------------------------------------------------------------------------------------------------

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
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a step of fasttrain cannot be captured in a CUDA graph yet: capture forward and "
                               "backward, and step outside of the graph")
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None and found_inf.item() != 0:  # torch's GradScaler: skip the whole step
            return
        scale = 1.0 if grad_scale is None else 1.0 / grad_scale.item()
        rules = [self.rule_of(group) for group in self.param_groups]
        sparse, items, before = [], [], []
        try:
            for index in self._scan(rules):
                where = self._places[index]
                p = self._param(where)
                grad = p.grad
                assert grad is not None
                if grad.layout != torch.strided:
                    sparse.append((p, grad, self.param_groups[where[0]]))
                    continue
                before.append((p, dict(self.state.get(p, ()))))
                item, step, fresh = self._examine(where, rules[where[0]])
                if not self._describe(index, item, fresh):
                    items.append((item, step, self.param_groups[where[0]]))
            keys = self._plan.rows() if self._plan is not None else []
            rows = [self._row(rules[group], self.param_groups[group], step, scale) for group, step in keys]
            runs = self._runs(items, scale)
            for p, grad, group in sparse:  # first: torch's function may refuse them
                self.step_sparse(p, grad, group)
            if keys:
                self._plan.run(table_of_rows(rows), None, torch.get_num_threads(),
                               torch.autograd.graph.increment_version)
        except BaseException:
            self._restore_states(before)
            raise
        finally:
            if self._plan is not None:
                self._plan.release()
        for run in runs:
            run()

    def _restore_states(self, before: list[tuple[Tensor, dict[str, Any]]]) -> None:
        for p, state in before:
            if state:
                self.state[p].clear()
                self.state[p].update(state)
            else:
                self.state.pop(p, None)

    def _scan(self, rules: list[Rule]) -> list[int]:
        """Indices of the parameters that have a gradient and are not, or no longer, in the plan."""
        lists = [params if isinstance(params := group["params"], list) else list(params) for group in self.param_groups]
        wanted = self.backend or dispatch.forced()
        if self._plan is not None and self._planned_for == (rules, wanted):
            found = self._plan.scan(self.state, lists)
            if found is not None:
                return found
        self._planned_for = (rules, wanted)
        self._places = [(g, i) for g, params in enumerate(lists) for i in range(len(params))]
        if self.defaults.get("differentiable") or wanted not in (None, "cpu") or native.load()[0] is None:
            self._plan = None
            return [index for index, where in enumerate(self._places) if self._param(where).grad is not None]
        self._plan = native.module().Plan(native.reader(), lists)
        return self._plan.scan(self.state, lists)

    def _param(self, where: tuple[int, int]) -> Tensor:
        return self.param_groups[where[0]]["params"][where[1]]

    def _name(self, where: tuple[int, int]) -> str:
        group, index = where
        names = self.param_groups[group].get("param_names")
        if names:
            return f"parameter {names[index]!r}"
        return f"parameter {index} of group {group} (shape {tuple(self._param(where).shape)})"

    def _examine(self, where: tuple[int, int], rule: Rule) -> tuple[Item, float, bool]:
        """Check one parameter and make its states; returns it, its step to come, and whether a state was made."""
        group, p, name = self.param_groups[where[0]], self._param(where), self._name(where)
        check_gradient(name, p)
        fresh = self.init_state(p, group, rule)
        state = self.state[p] if rule.state or self.counts_steps else {}
        tensors = reals(name, p, rule.state, state)
        counter = None
        if self.counts_steps:
            check_counter(name, state.get("step"))
            counter = plain(state["step"])
        step = counter.item() + 1 if counter is not None else 1 if fresh else 2
        return Item(name, rule, tensors, (), counter), step, fresh

    def _describe(self, index: int, item: Item, fresh: bool) -> bool:
        """Give a parameter to the plan, if it can take it."""
        p = self._param(self._places[index])
        if self._plan is None or p.is_complex() or native.number_of(item.rule) is None:
            return False
        keys = (*item.rule.state, *(("step",) if self.counts_steps else ()))
        return self._plan.set(index, native.number_of(item.rule), item.dtype == torch.float64,
                              self.state[p] if keys else {}, keys, self.counts_steps, fresh)

    def _row(self, rule: Rule, group: Group, step: float, scale: float) -> list[float]:
        """The gradient's scale and the coefficients of one group and step count."""
        numbers = {name: number(group[name]) for name in rule.hyperparameters}
        return [-scale if group.get("maximize") else scale, *trace(rule).row(int(step), numbers)]

    def _runs(self, items: list[tuple[Item, float, Group]], scale: float) -> list[Callable[[], None]]:
        """What steps the items that are not in the plan, each on the backend of its device."""
        if self.defaults.get("differentiable"):
            return [partial(reference.write, item, -scale if group.get("maximize") else scale,
                            item.rule.scalars(int(step), group)) for item, step, group in items]
        by_backend: dict[str, list[Item]] = {}
        for item, step, group in items:
            backend = dispatch.choose(item.tensors[0].device, self.backend)
            row = self._row(item.rule, group, step, scale)
            by_backend.setdefault(backend, []).append(replace(item, row=row))
        return [partial(dispatch.load(backend).step, together)
                for backend, chosen in by_backend.items() for together in in_turns(chosen)]

    # --- State that goes out and comes back ---------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group, as torch does; the same parameter twice in it is an error.

        Raises:
            ValueError: a parameter occurs twice: it would be stepped twice.
        """
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        if len({id(p) for p in params}) != len(params):
            twice = next(i for i, p in enumerate(params) if any(p is other for other in params[:i]))
            message = f"{self._name((len(self.param_groups) - 1, twice))} occurs twice in its group: give it once"
            self.param_groups.pop()
            raise ValueError(message)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, of this class or of torch's optimizer of the same name; every state keeps its own dtype.

        torch casts floating-point states to the parameter's dtype, which loses fp32 moments of bf16 parameters.
        """
        hooks = self._optimizer_load_state_dict_pre_hooks
        state_dict = state_dict.copy()
        for hook in hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._loading = state_dict
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()  # they have run: torch must not run them again
        try:
            super().load_state_dict(state_dict)
        finally:
            self._loading = None
            self._optimizer_load_state_dict_pre_hooks = hooks

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan = None
        for group in self.param_groups:
            group.setdefault("maximize", False)
        if self._loading is not None:
            self._restore_dtypes(self._loading)

    def _restore_dtypes(self, saved: Mapping[str, Any]) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        numbers = [n for group in saved["param_groups"] for n in group["params"]]
        for n, p in zip(numbers, params, strict=True):
            for key, value in saved["state"].get(n, {}).items():
                loaded = self.state[p].get(key)
                if key != "step" and isinstance(value, Tensor) and loaded.dtype != value.dtype:
                    self.state[p][key] = value.to(p.device)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend}
