"""The face of every optimizer: `torch.optim.Optimizer` whose step is one fused pass over memory.

One step goes through four phases:

1. *Scan.* The native plan compares every parameter, gradient and state with what it knows, takes their pointers, and
   returns the few that it does not know: new ones, and ones whose dtype, layout, device or state changed.
2. *Examine.* Those are checked here, in Python, their states are made where missing, and they are described to the
   plan. What no flat loop can walk (strided views, other devices, subclasses) is kept apart as items.
3. *Coefficients*, one row for each (parameter group, step count, running numbers), in double precision.
4. *Run.* The plan is walked, items go to the backend of their device.

Nothing is written before every parameter has been examined: bad input raises and leaves all as it was, without the
states that were made on the way.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasttrain.kernels import dispatch, native, reference
from fasttrain.kernels.item import Item, in_turns, table_of_rows
from fasttrain.kernels.trace import trace
from fasttrain.optim import clip, ema, kept, statedict
from fasttrain.optim.arrival import Arrival
from fasttrain.optim.checks import check_counter, check_gradient, check_running, number, plain, reals
from fasttrain.optim.equation import EQUATION, reads_step
from fasttrain.optim.local import (
    as_whole,
    check_placed,
    dtensor_type,
    is_dtensor,
    local,
    place,
    settle,
    shares,
    version,
)
from fasttrain.optim.report import StepReport
from fasttrain.precision import draws
from fasttrain.precision.storage import DEFAULTS, describe, is_plain, normalised
from fasttrain.rule import Rule

Group = dict[str, Any]
LATE = 1000  # a step at which a state retains what it always will, for averages that begin by forgetting


class Examined(NamedTuple):
    """A parameter that was looked at in Python: how it is stepped, and what the plan must know of it."""

    where: tuple[int, int]  # group, and index in it
    group: Group            # with the running numbers of this parameter
    item: Item
    step: float             # the count of the step to come
    fresh: bool             # a state was made
    kept: kept.Layout | None


class Optimizer(torch.optim.Optimizer):
    """Base of every optimizer, and of yours: an equation in the vocabulary of `fasttrain.rule`, and a constructor.

    A page (a subclass) gives `state`, `coefficients` and `element`, as described there, or its `rules`. A rule that is
    not in the compiled module is compiled at first use; see docs/optimizers.md.

    Arguments:
        params: parameters, named parameters, or parameter groups, as in `torch.optim.Optimizer`.
        defaults: hyperparameters of groups that do not give their own. Those that `coefficients` names must be there.
        options: `backend`, a name from `fasttrain.kernels.dispatch` or None to choose; `storage`, the name of a preset
            of `fasttrain.precision.storage`; and that module's options, for groups that do not give their own. A page
            hands on what it does not know itself.

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

    rules: tuple[Rule, ...] = ()
    counts_steps = False  # whether the optimizer's state has torch's `step`
    running: tuple[str, ...] = ()  # states of one number for each parameter, which `advance` replaces
    backend: str | None = None
    last_step: StepReport = StepReport()
    _plan: Any = None
    _planned_for: tuple[list[Rule], str | None] | None = None  # the rule of each group, and the backend that is forced
    _loading: Mapping[str, Any] | None = None
    _storage: Mapping[str, Any] = {}
    _clip: float = 1.0  # what the next step multiplies the gradients with: the coefficient of `clip_grad_norm_`
    _syncs: int = 0  # waits for a device since the last step
    _swapped: bool = False  # the parameters are their EMA
    arriving: Arrival | None = None

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Make the rule of a page that gives an equation. Steps are counted where its `coefficients` read them."""
        super().__init_subclass__(**keywords)
        own = {"state", "coefficients", "element", "positive", "retain", "exact"} & vars(cls).keys()
        if "rules" in vars(cls) or not own or not hasattr(cls, "element"):
            return
        for part in ("state", "coefficients"):
            if not hasattr(cls, part):
                raise TypeError(f"class {cls.__name__} has no `{part}`: {EQUATION}")
        cls.rules = (Rule.of(cls),)
        if "counts_steps" not in vars(cls):
            cls.counts_steps = cls.counts_steps or reads_step(cls.rules[0])

    def __init__(self, params, defaults, **options):
        if not self.rules:
            raise TypeError(f"{type(self).__name__} has no equation: {EQUATION}")
        self._take(options)
        torch.optim.Optimizer.__init__(self, params, defaults)

    def _take(self, options: dict[str, Any]) -> None:
        """Keep the options that every optimizer has. Before torch's constructor, which adds the parameter groups."""
        self.backend = options.pop("backend", None)
        self._storage = normalised(options)
        self._remainders: dict[int, Tensor] = {}  # second arrays of parameters that have no state yet, by id
        self._arrived: set[int] = set()  # parameters that were stepped before `step`, by id
        self._versions: dict[int, int] = {}  # of parameters stepped as items and watched, by id, after our last write
        if unknown := [name for name in options if name != "storage" and name not in DEFAULTS]:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(map(repr, unknown))}")

    # --- What a page may say differently ------------------------------------------------------------------------------

    def rule_of(self, group: Group) -> Rule:
        """The rule that the options of a group select."""
        return self.rules[0]

    def init_state(self, p: Tensor, group: Group, rule: Rule) -> bool:
        """Make the states that `p` lacks; True if any was made."""
        if self.counts_steps and "step" not in self.state[p]:
            self.state[p]["step"] = torch.zeros((), dtype=torch.float32)
        missing = [name for name in rule.state if self.state[p].get(name) is None]
        for name in missing:
            self.state[p][name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return bool(missing)

    def step_sparse(self, p: Tensor, grad: Tensor, group: Group) -> None:
        """Step a parameter whose gradient is sparse."""
        raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")

    def advance(self, state: dict[str, Any], group: Group, step: float) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """The numbers of `running` that `coefficients` reads in a step, and those that are kept after it.

        The first are in double precision. `state` has the numbers of `running` only, and is not changed here: equal
        numbers are advanced once for all parameters of a group and step that have them.
        """
        raise NotImplementedError

    def takes_storage(self, group: Group) -> bool:
        """Whether storage options apply to a group: they do where one elementwise rule steps it."""
        return True

    def stepped(self) -> None:
        """Called after every step that was made: not after one that was skipped or raised."""

    def loaded_shapes(self, p: Tensor, group: Group) -> dict[str, tuple[int, ...] | None]:
        """The entries that a loaded state of `p` must have, and their shapes; None: any shape."""
        rule = self.rule_of(group)
        shapes: dict[str, tuple[int, ...] | None] = dict.fromkeys((*(("step",) if self.counts_steps else ()),
                                                                   *self.running))
        if is_plain(group):
            return shapes | dict.fromkeys(rule.state, tuple(p.shape))
        return shapes | self._layout("a parameter", p, p.dtype, group, rule).shapes(p.shape)

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
        if self._swapped:
            raise RuntimeError("the parameters are their EMA (ema_weights): step after the `with` block")
        report = StepReport()
        scale = self._scale(report)
        if scale is None:  # torch's GradScaler found something: skip the whole step
            self._finish(report)
            return
        rules = [self.rule_of(group) for group in self.param_groups]
        sparse, examined, before, after = [], [], [], []
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
                one = self._examine(where, rules[where[0]], report)
                if not self._describe(index, one):
                    one, replaced = self._advance(one)
                    examined.append(one)
                    after += replaced
            walk = self._walk(rules, scale)
            runs = self._runs(examined, scale, report)
            for p, grad, group in sparse:  # first: torch's function may refuse them
                self.step_sparse(p, grad, group)
            if walk is not None:
                walk(report)
        except BaseException:
            self._restore_states(before)
            raise
        finally:
            if self._plan is not None:
                self._plan.release()
        for run in runs:
            run()
        for tensor, value in after:
            tensor.copy_(value)
        self.stepped()
        self._finish(report)

    def _step_only(self, p: Tensor) -> None:
        """Step one parameter whose gradient has arrived."""
        where = next((g, i) for g, group in enumerate(self.param_groups)
                     for i, other in enumerate(group["params"]) if other is p)
        with torch.no_grad():
            report = StepReport()
            before = [(p, dict(self.state.get(p, ())))]
            try:
                one, after = self._advance(self._examine(where, self.rule_of(self.param_groups[where[0]]), report))
                runs = self._runs([one], self._clip, report)
            except BaseException:
                self._restore_states(before)
                raise
            for run in runs:
                run()
            for tensor, value in after:
                tensor.copy_(value)
        self._arrived.add(id(p))

    def _advance(self, one: Examined) -> tuple[Examined, list[tuple[Tensor, Any]]]:
        """The hyperparameters with the running numbers of one parameter, and what replaces these when all is done."""
        group, before, after = self._advanced(one.where, one.step)
        return one._replace(group=group), list(zip(before, after, strict=True))

    def _advanced(self, where: tuple[int, int], step: float) -> tuple[Group, list[Tensor], list[Tensor]]:
        """The hyperparameters with the running numbers of a step; those before it, those after it, of equal types."""
        group = self.param_groups[where[0]]
        if not self.running:
            return group, [], []
        kept = self.state[self._param(where)]
        for key in self.running:
            check_running(self._name(where), key, kept)
        before = {key: kept[key] for key in self.running}
        now, later = self.advance(before, group, step)
        after = {**before, **{key: torch.as_tensor(value).to(before[key]).reshape(before[key].shape)
                              for key, value in later.items()}}
        return {**group, **now}, list(before.values()), list(after.values())

    def _scale(self, report: StepReport) -> float | None:
        """What the gradients are multiplied with; None if the step is to be skipped."""
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        report.host_syncs, self._syncs = self._syncs, 0
        for tensor in (found_inf, grad_scale):
            report.host_syncs += isinstance(tensor, Tensor) and tensor.device.type != "cpu"
        if found_inf is not None and found_inf.item() != 0:
            report.skipped = True
            return None
        return self._clip if grad_scale is None else self._clip / grad_scale.item()

    def _finish(self, report: StepReport) -> None:
        """What a step does after the kernels."""
        self._clip = 1.0
        for index, group in enumerate(self.param_groups):
            if not report.skipped:
                if group.get("ema_decay") is not None:
                    ema.follow_resting(self, index)
                if "draws" in group:
                    group["draws"] += 1
            elif group.get("zero_gradients"):
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.detach_().zero_()
        self._arrived.clear()
        self.last_step = report

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
        self._plan = native.module().Plan(native.reader(dtensor_type()), lists)
        return self._plan.scan(self.state, lists)

    def _param(self, where: tuple[int, int]) -> Tensor:
        return self.param_groups[where[0]]["params"][where[1]]

    def _name(self, where: tuple[int, int]) -> str:
        group, index = where
        names = self.param_groups[group].get("param_names")
        if names:
            return f"parameter {names[index]!r}"
        return f"parameter {index} of group {group} (shape {tuple(self._param(where).shape)})"

    def _identity(self, where: tuple[int, int]) -> int:
        """64 bits that stand for a parameter in random draws: of its name if it has one, else of its place."""
        names = self.param_groups[where[0]].get("param_names")
        before = sum(len(group["params"]) for group in self.param_groups[: where[0]])
        told = names[where[1]] if names else str(before + where[1])
        return int.from_bytes(hashlib.blake2b(told.encode(), digest_size=8).digest(), "little")

    def _examine(self, where: tuple[int, int], rule: Rule, report: StepReport) -> Examined:
        """Check one parameter and make its states."""
        group, whole, name = self.param_groups[where[0]], self._param(where), self._name(where)
        check_placed(name, whole)
        settle(whole)
        p, grad = local(whole), local(whole.grad)
        check_gradient(name, p, grad)
        known = len(self.state.get(whole, ()))
        fresh = self.init_state(whole, group, rule)
        kept_apart = rule.state or self.counts_steps or self.running or not is_plain(group)
        state = {key: local(value) for key, value in self.state[whole].items()} if kept_apart else {}
        counter = None
        if self.counts_steps:
            check_counter(name, state.get("step"))
            counter = plain(state["step"])
        step = counter.item() + 1 if counter is not None else 1 if fresh else 2
        if is_plain(group):
            item = Item(name, rule, reals(name, p, grad, rule.state, state), (), counter)
            report.allocations += len(state) - known
            return Examined(where, group, item, step, fresh, None)
        layout = self._layout(name, whole, grad.dtype, group, rule)
        if (digits := self._remainders.pop(id(whole), None)) is not None and layout.extras[0] is not None:
            state[layout.extras[0]] = digits
            self.state[whole][layout.extras[0]] = as_whole(digits, whole)
        made = kept.complete(p, state, layout, fresh or step == 1)  # torch makes Adagrad's with the optimizer
        self.state[whole].update((key, as_whole(state[key], whole)) for key in made)
        report.allocations += len(self.state[whole]) - known
        if layout.stochastic:
            group.setdefault("draws", 0)
        if self._written_outside(where, whole):
            kept.follow(p, state, layout)
        mains, extras = kept.operands(name, p, grad, state, layout, group)
        item = Item(name, rule, mains, (), counter, layout.codecs, extras, bool(group.get("zero_gradients")),
                    place=place(name, whole) if layout.stochastic else (0, 0, 0))
        return Examined(where, group, item, step, fresh, layout)

    def _layout(self, name: str, p: Tensor, grad_dtype: torch.dtype, group: Group, rule: Rule) -> kept.Layout:
        """How the options of a group keep a parameter."""
        retained = {}
        if rule.retain:
            known = {**dict.fromkeys(self.running, math.nan), **group}  # these are not known: nor what depends on them
            retained = rule.scalars(LATE, {key: number(known[key]) for key in rule.hyperparameters})
        return kept.layout(name, p, grad_dtype, group, rule, retained)

    def _written_outside(self, where: tuple[int, int], p: Tensor) -> bool:
        """Whether the parameter was written since our last step, where that is known."""
        known = self._versions.pop(id(p), -1)
        if known < 0 and self._plan is not None:
            known = self._plan.version(self._places.index(where))
        return known >= 0 and known != version(p)

    def _describe(self, index: int, one: Examined) -> bool:
        """Give a parameter to the plan, if it can take it."""
        rule, p = one.item.rule, self._param(self._places[index])
        if self._plan is None or p.is_complex() or p.device.type != "cpu":
            return False
        if shares(p) and one.group.get("clip_each") is not None:  # the plan knows the norm of the local part
            return False
        if native.number_of(rule) is None:
            return False
        counted = ("step",) if self.counts_steps else ()
        wide = one.item.dtype == torch.float64
        if one.kept is None:
            keys = (*rule.state, *counted)
            return self._plan.set(index, native.number_of(rule), wide, self.state[p] if keys or self.running else {},
                                  keys, self.counts_steps, one.fresh, None, self.running)
        told = (one.kept.codecs, one.kept.extras, one.kept.averaged, one.item.zero, self._identity(one.where),
                one.item.place, one.kept.extras[0] is not None)
        return self._plan.set(index, native.number_of(rule), wide, self.state[p], (*one.kept.keys[2:], *counted),
                              self.counts_steps, one.fresh, told, self.running)

    def _row(self, rule: Rule, group: Group, step: float, scale: float) -> list[float]:
        """The gradient's scale, the coefficients of one group and step count, and the tail where there is one."""
        numbers = {name: number(group[name]) for name in rule.hyperparameters}
        row = [-scale if group.get("maximize") else scale, *trace(rule).row(int(step), numbers)]
        if is_plain(group):
            return row
        decay, largest = group.get("ema_decay"), group.get("clip_value")
        keep, add = (1.0, 0.0) if decay is None else (decay, 1.0 - decay)
        return [*row, math.inf if largest is None else largest, keep, add]

    def _key(self, group: Group) -> int:
        """The key of this step's random draws in a group."""
        return draws.step_key(group.get("seed", 0), group["draws"]) if "draws" in group else 0

    def _walk(self, rules: list[Rule], scale: float) -> Callable[[StepReport], None] | None:
        """What steps the parameters that are in the plan."""
        if self._plan is None:
            return None
        each = any(group.get("clip_each") is not None for group in self.param_groups)
        at = self._plan.rows(each)
        if not at:
            return None
        scales = [scale] * len(at)
        if each:
            squares, _ = self._plan.squares(torch.get_num_threads())
            limits = [self.param_groups[group].get("clip_each") for group, _, _ in at]
            scales = [scale * clip.coefficient(abs(scale) * math.sqrt(square), limit)
                      for square, limit in zip(squares, limits, strict=True)]
        advanced = [self._advanced(self._places[first], step) for _, step, first in at]
        rows = [self._row(rules[number], group, step, own)
                for (number, step, _), (group, _, _), own in zip(at, advanced, scales, strict=True)]
        keys = np.array([self._key(group) for group, _, _ in advanced], np.uint64)
        replaced = [tuple(after) for _, _, after in advanced]

        def walk(report: StepReport) -> None:
            self._plan.run(table_of_rows(rows), keys, torch.get_num_threads(),
                           torch.autograd.graph.increment_version, replaced)
            done = self._plan.last
            report.launches += 1 + each
            report.parameters += done["parameters"]
            report.bytes_read += done["bytes_read"]
            report.bytes_written += done["bytes_written"]
        return walk

    def _runs(self, examined: list[Examined], scale: float, report: StepReport) -> Iterator[Callable[[], None]]:
        """What steps the parameters that are not in the plan, each on the backend of its device."""
        by_backend: dict[str, list[Item]] = {}
        runs: list[Callable[[], None]] = []
        watched, wholes = [], []
        for one in examined:
            group, p = one.group, self._param(one.where)
            own = scale * clip.coefficient_of_one(p, abs(scale), group.get("clip_each"))
            if self.defaults.get("differentiable"):
                scalars = one.item.rule.scalars(int(one.step), group)
                item = replace(one.item, row=self._row(one.item.rule, group, one.step, own) if one.kept else ())
                runs.append(partial(reference.write, item, -own if group.get("maximize") else own, scalars))
                continue
            backend = dispatch.choose(one.item.tensors[0].device, self.backend)
            key = draws.parameter_key(self._key(group), self._identity(one.where)) if one.kept else 0
            item = replace(one.item, row=self._row(one.item.rule, group, one.step, own), key=key)
            by_backend.setdefault(backend, []).append(item)
            report.count(item)
            if is_dtensor(p):
                wholes.append(p)
            if one.kept is not None and one.kept.extras[0] is not None:
                watched.append(p)
        for backend, chosen in by_backend.items():
            for together in in_turns(chosen):
                runs.append(partial(self._run, dispatch.load(backend).step, together, report))
        if wholes:  # the kernels have written their local parts; autograd may have saved the wholes
            runs.append(partial(torch.autograd.graph.increment_version, wholes))
        if watched:
            runs.append(partial(self._remember, watched))
        return iter(runs)

    def _run(self, step: Callable[[Any], int | None], items: Any, report: StepReport) -> None:
        report.launches += step(items) or 1

    def _remember(self, watched: list[Tensor]) -> None:
        self._versions.update((id(p), version(p)) for p in watched)

    # --- Around the step ----------------------------------------------------------------------------------------------

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Scale the gradients of the next step so that their total norm is at most `max_norm`; none is rewritten.

        See `fasttrain.optim.clip_grad_norm`, which does the same for several optimizers together.

        Example:
            >>> from fasttrain.optim import SGD
            >>> weight = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = SGD([weight], lr=1.0)
            >>> weight.grad = torch.tensor([3.0, 4.0])
            >>> optimizer.clip_grad_norm_(1.0)
            tensor(5.)
            >>> optimizer.step()
            >>> weight.data
            tensor([0.4000, 0.2000])
        """
        return clip.clip_grad_norm([self], max_norm, norm_type, error_if_nonfinite)

    def grad_statistics(self) -> tuple[Tensor, Tensor]:
        """Of all gradients: the sum of squares (float64), and whether any element is infinite or NaN; both of shape ().

        One pass over the gradients; of shards, the sum and the answer are those of the whole on every process.

        Raises:
            RuntimeError: parameters are stepped as their gradients arrive.
        """
        if self.arriving is not None:
            raise RuntimeError("parameters are stepped as their gradients arrive (step_on_arrival), before anything "
                               "can divide by a loss scale or skip: remove() that, or train without a scaler")
        return clip.statistics([self])

    def step_scaled(self, scale: Tensor, found: Tensor, norm: Tensor, max_norm: float | None = None) -> None:
        """Step with gradients divided by `scale`, clipped to `max_norm` by their `norm`; skip if `found`.

        What `fasttrain.LossScaler.step` calls; all three are tensors of one element.
        """
        if max_norm is not None:
            self._clip = clip.coefficient(norm.item(), max_norm)
        self.grad_scale, self.found_inf = scale, found
        try:
            self.step()
        finally:
            del self.grad_scale, self.found_inf

    def step_on_arrival(self, accumulation: int = 1) -> Arrival:
        """Step each parameter as soon as its gradient is complete, in backward, and free the gradient.

        Gradients then never exist all at once. `step` still ends a step: call it after the backward passes, as usual.
        A norm of all gradients is not known in time, so `clip_grad_norm_` raises; a gradient scaler cannot skip what
        has been stepped, so it does not go together with this either.

        Arguments:
            accumulation: backward passes of one step; a parameter is stepped at the last of them.

        Returns:
            What `remove()` ends it with.

        Raises:
            RuntimeError: it is on already.
            ValueError: `accumulation` is not positive.

        Example:
            >>> from fasttrain.optim import SGD
            >>> layer = torch.nn.Linear(2, 1)
            >>> optimizer = SGD(layer.parameters(), lr=0.1)
            >>> arrival = optimizer.step_on_arrival()
            >>> layer(torch.ones(1, 2)).sum().backward()
            >>> layer.weight.grad is None
            True
            >>> optimizer.step()
        """
        if self.arriving is not None:
            raise RuntimeError("parameters are stepped on arrival already: remove() that first")
        self.arriving = Arrival(self, accumulation)
        return self.arriving

    def ema_weights(self) -> AbstractContextManager[None]:
        """A context in which the parameters hold their EMA, for evaluation; afterwards they are as before.

        Raises:
            RuntimeError: no group has an `ema_decay`, or the block is inside another.

        Example:
            >>> from fasttrain.optim import SGD
            >>> weight = torch.nn.Parameter(torch.ones(1))
            >>> optimizer = SGD([weight], lr=1.0, ema_decay=0.5)
            >>> weight.grad = torch.ones(1)
            >>> optimizer.step()
            >>> with optimizer.ema_weights():
            ...     weight.item()
            0.5
            >>> weight.item()
            0.0
        """
        return ema.weights(self)

    # --- State that goes out and comes back ---------------------------------------------------------------------------

    def full_precision(self) -> list[Tensor]:
        """Every parameter with all the digits that its master keeps: fp32 (fp64 of fp64), in the order of the groups.

        Example:
            >>> from fasttrain.optim import SGD
            >>> weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
            >>> optimizer = SGD([weight], lr=1e-4, master="split")
            >>> weight.grad = torch.ones_like(weight)
            >>> optimizer.step()
            >>> weight.data, optimizer.full_precision()
            (tensor([1.], dtype=torch.bfloat16), [tensor([0.9999])])
        """
        return [kept.full_precision(p, self.state.get(p, {}), group)
                for group in self.param_groups for p in group["params"]]

    def load_full_precision(self, weights: Sequence[Tensor]) -> None:
        """Set every parameter, and its master or remainder, from fp32 weights: those of an fp32 checkpoint, say.

        Arguments:
            weights: as `full_precision` returns them.

        Raises:
            ValueError: they are not as many, or not of the parameters' shapes; nothing was changed.
        """
        places = [(g, i) for g, group in enumerate(self.param_groups) for i in range(len(group["params"]))]
        if len(weights) != len(places):
            raise ValueError(f"{len(weights)} weights are given for {len(places)} parameters")
        for where, value in zip(places, weights, strict=True):
            if value.shape != self._param(where).shape:
                raise ValueError(f"{self._name(where)}: the weight has shape {tuple(value.shape)}")
        with torch.no_grad():
            for where, value in zip(places, weights, strict=True):
                p, group = self._param(where), self.param_groups[where[0]]
                made = kept.set_full_precision(self._name(where), p, value, self.state.get(p, {}), group)
                if made is not None:
                    self._remainders[id(p)] = made
                self._versions[id(p)] = p._version

    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group, as torch does; the same parameter twice in it is an error.

        Raises:
            ValueError: a parameter occurs twice: it would be stepped twice; or a storage option is wrong.
        """
        options = {**self._storage, **normalised(param_group)}
        param_group.pop("storage", None)
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        if len({id(p) for p in params}) != len(params):
            twice = next(i for i, p in enumerate(params) if any(p is other for other in params[:i]))
            message = f"{self._name((len(self.param_groups) - 1, twice))} occurs twice in its group: give it once"
            self.param_groups.pop()
            raise ValueError(message)
        self.param_groups[-1].update(options)
        try:
            self._check_kept(len(self.param_groups) - 1)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_kept(self, index: int) -> None:
        """Refuse parameters that the options of their group cannot keep."""
        group = self.param_groups[index]
        if not is_plain(group):
            if not self.takes_storage(group):
                raise ValueError(f"group {index} is given {describe(group)}; {type(self).__name__} does not step it "
                                 "element by element, and keeps it as torch would: leave these options out")
            group.setdefault("maximize", False)
            widened = []
            for place, p in enumerate(group["params"]):
                name = self._name((index, place))
                if self._layout(name, p, p.dtype, group, self.rule_of(group)).widened:
                    widened.append(name)
            if widened:
                warnings.warn(f"group {index} keeps fp32 states for {', '.join(widened)} in spite of "
                              f"{describe(group)}: its shards cut blocks of {kept.BLOCKS} elements", stacklevel=5)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, of this class or of torch's optimizer of the same name; every state keeps its own dtype.

        torch casts floating-point states to the parameter's dtype, which loses fp32 moments of bf16 parameters.

        Raises:
            ValueError: the state is of other parameters, of another optimizer, or was kept by other storage options;
                nothing was changed.
        """
        hooks = self._optimizer_load_state_dict_pre_hooks
        state_dict = state_dict.copy()
        for hook in hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        statedict.check(self, state_dict)
        state_dict = statedict.with_own_options(self, state_dict)
        self._loading = state_dict
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()  # they have run: torch must not run them again
        try:
            super().load_state_dict(state_dict)
        finally:
            self._loading = None
            self._optimizer_load_state_dict_pre_hooks = hooks

    def check_loaded(self, where: tuple[int, int], group: Group, state: Mapping[str, Any]) -> None:
        """Refuse a loaded state that is not one of this optimizer's, for the parameter at `where`."""
        p = self._param(where)
        optional = {"remainder", "master", "compensation", kept.EMA}  # made anew from the parameter
        statedict.check_state(self._name(where), self.loaded_shapes(p, group), optional, state)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan, self._versions, self._remainders, self._arrived, self._clip = None, {}, {}, set(), 1.0
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
        return {**super().__getstate__(), "backend": self.backend, "_storage": self._storage}  # no plan, no hooks
