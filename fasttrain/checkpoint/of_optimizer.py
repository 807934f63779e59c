"""An optimizer as an entry of a state: every array of every parameter, under the parameter's name."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor

from fasttrain.checkpoint import encoding, fits, of_zero
from fasttrain.checkpoint.homes import home, reference
from fasttrain.checkpoint.parts import Among, Part, need_memory, parts_of, tensor_of
from fasttrain.checkpoint.problems import Problem
from fasttrain.checkpoint.regions import Region
from fasttrain.checkpoint.saved import Plan, Saved, given, refuse, states_of, whole_reads
from fasttrain.checkpoint.stages import Held
from fasttrain.checkpoint.together import told_of
from fasttrain.optim import Optimizer
from fasttrain.optim.local import is_dtensor
from fasttrain.parallel import Zero
from fasttrain.precision.storage import DEFAULTS, describe, is_plain

OWN = ("params", "param_names")  # of a group: not its options
STEPPED = ("draws",)  # what a group has from its first step on: one that was saved before it begins anew


class OfOptimizer:
    """Of this package or torch's, or a `Zero` of either; its states whole, in ranges or in DTensors.

    That of a pipeline's stage has the stage's parameters. Its groups are loaded by their names: they may be divided
    otherwise than they were.

    Arguments:
        key: of the entry.
        names: of its parameters, by their ids.
        everyone: the ranks that hold the same.
        stage: of a pipeline, its number.
    """

    def __init__(self, key: str, optimizer: torch.optim.Optimizer, names: Mapping[int, str], everyone: Among,
                 stage: int = 0):
        self.key, self.optimizer, self.names, self.everyone, self.stage = key, optimizer, names, everyone, stage
        self.inner: Any = optimizer.inner if isinstance(optimizer, Zero) else optimizer
        self.class_name = type(self.inner).__name__

    # --- Out ----------------------------------------------------------------------------------------------------------

    def held(self) -> Held:
        """What it holds."""
        return Held({f"{self.key}/{name}": p.numel() * p.element_size() for name, p in self._params().items()}, [])

    def _params(self) -> dict[str, Any]:
        """Its parameters, by name."""
        return {self.names[id(p)]: p for group in self.optimizer.param_groups for p in group["params"]}

    def save(self) -> tuple[list[Part], Any]:
        """Its parts here, and what this rank tells beside them.

        Raises:
            RuntimeError: its parameters are their averages (`ema_weights`) at the moment.
        """
        if getattr(self.optimizer, "_swapped", False):
            raise RuntimeError(f"{self.key}: the parameters are their EMA (ema_weights): save after the `with` block")
        parts: list[Part] = []
        digits: dict[str, Any] = {}
        if isinstance(self.optimizer, Zero):
            if getattr(self.inner, "_remainders", None):
                raise RuntimeError(f"{self.key}: its parameters were given weights in full precision and have made no "
                                   "step since: save after a step")
            groups, more = self.optimizer.param_groups, {}
            params = [group["params"] for group in groups]
            states, parts = of_zero.save(self.optimizer, self.key, self.names, self.everyone)
        else:
            state_dict = self.optimizer.state_dict()
            groups, params = state_dict["param_groups"], [group["params"] for group in self.optimizer.param_groups]
            more = {key: value for key, value in state_dict.items() if key not in ("state", "param_groups")}
            by_number = {number: p for group, own in zip(groups, params, strict=True)
                         for number, p in zip(group["params"], own, strict=True)}
            states = {}
            for number, state in state_dict["state"].items():
                if number not in by_number:
                    more.setdefault("state", {})[number] = state
                    continue
                p = by_number[number]
                states[self.names[id(p)]] = self._encoded(p, state, parts)
            digits = self._digits(parts)

        def take(path: str, value: Any) -> Mapping[str, Any]:
            # Each stage has its own, by its own numbers of groups.
            name = f"{self.key}/stage{self.stage}/{path}" if self.stage else f"{self.key}/{path}"
            value = tensor_of(name, value)
            parts.extend(parts_of(name, value, self.everyone))
            return {"name": name, **({"device": "cuda"} if value.is_cuda else {})}

        told: dict[str, Any] | None = {
            "kind": "optimizer", "class": self.class_name, "state": states, "digits": digits,
            "more": encoding.encode(more, take, "more"),
            "groups": [{"names": [self.names[id(p)] for p in own], "options": encoding.encode(
                {key: group[key] for key in sorted(group) if key not in OWN}, take, f"groups/{index}")}
                for index, (group, own) in enumerate(zip(groups, params, strict=True))]}
        if self.everyone.index > 0:
            told = {"kind": "optimizer", "state": states} if isinstance(self.optimizer, Zero) else None
        return parts, told

    def _digits(self, parts: list[Part]) -> dict[str, Any]:
        """What parameters lack that were given weights in full precision, and have made no step since."""
        found = {}
        for p in (p for group in self.optimizer.param_groups for p in group["params"]):
            if (second := getattr(self.optimizer, "_remainders", {}).get(id(p))) is not None:
                if is_dtensor(p):
                    raise RuntimeError(f"{self.key}: {self.names[id(p)]} is sharded, has weights in full precision "
                                       "(load_full_precision) and has made no step since: save after a step")
                name = self._address(p, "digits")
                parts.extend(parts_of(name, second, self.everyone))
                found[self.names[id(p)]] = {encoding.MARK: "tensor", **reference(name, second, p)}
        return found

    def _address(self, p: Tensor, path: str) -> str:
        return f"{self.key}/{self.names[id(p)]}/{path}"

    def _encoded(self, p: Tensor, state: Mapping[str, Any], parts: list[Part]) -> Any:
        """A parameter's state as JSON; its tensors go to `parts`."""
        def take(path: str, value: Any) -> Mapping[str, Any]:
            name = self._address(p, path)
            value = tensor_of(name, value)
            parts.extend(parts_of(name, value, self.everyone))
            return reference(name, value, p)

        return encoding.encode(dict(state), take)

    # --- In -----------------------------------------------------------------------------------------------------------

    def plan(self, saved: Saved, elsewhere: Set[str] = frozenset()) -> Plan:
        """How it would be loaded.

        Arguments:
            elsewhere: addresses that other stages of a pipeline hold.
        """
        told = told_of(saved, self.key)
        if not isinstance(told, Mapping) or told.get("kind") != "optimizer":
            return refuse(f"{self.key}: the checkpoint has no optimizer of this name")
        if told["class"] != self.class_name:
            return refuse(f"{self.key}: the checkpoint's is {told['class']}, the one to load is {self.class_name}")
        states = states_of(saved, self.key)
        ours = isinstance(self.inner, Optimizer)
        if problems := self._different_names(told, states, elsewhere) or ([] if ours else fits.different_shapes(
                self.key, self._params(), states, saved)):
            return refuse(*problems)
        groups = self._groups(told, saved)
        if isinstance(groups, str):
            return refuse(groups)
        numbers, params = self._numbers()
        for p in params:
            need_memory(f"{self.key}: {self.names[id(p)]}", p)
        metas = {numbers[id(p)]: encoding.decode(states[name], lambda one: fits.meta(one, saved))
                 for p in params if (name := self.names[id(p)]) in states}
        try:
            fits.check(self.optimizer, self.names, metas, groups)
        except (ValueError, TypeError) as error:
            return refuse(f"{self.key}: {error}")
        if isinstance(self.optimizer, Zero):
            reads, apply = of_zero.plan(self.optimizer, saved, states, groups, self.names)
        else:
            reads, apply = self._plain(saved, states, groups, told, params, numbers)
        for group in told["groups"]:
            reads += whole_reads(group["options"], saved)
        return Plan([], reads + whole_reads(told.get("more", {}), saved), apply, order=1)

    def _numbers(self) -> tuple[dict[int, int], list[Any]]:
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        return {id(p): number for number, p in enumerate(params)}, params

    def _different_names(self, told: Mapping[str, Any], states: Mapping[str, Any],
                         elsewhere: Set[str]) -> list[Problem]:
        """What one of both has and the other does not. Parameters that are never stepped may come and go."""
        known = {name for group in told["groups"] for name in group["names"]}
        params = self._params()
        missing = [f"{name} {tuple(p.shape)}" for name, p in params.items() if name not in known and p.requires_grad]
        unexpected = [name for name in states if name not in params and f"{self.key}/{name}" not in elsewhere]
        return [Problem(f"{self.key}: {what}", tuple(names)) for what, names in (
            ("missing in the checkpoint", missing), ("unexpected, the optimizer has no", unexpected)) if names]

    def _groups(self, told: Mapping[str, Any], saved: Saved) -> list[dict[str, Any]] | str:
        """The options of every group of ours, by the names of its parameters; or what is wrong."""
        home = {name: index for index, group in enumerate(told["groups"]) for name in group["names"]}
        made = []
        for index, group in enumerate(self.optimizer.param_groups):
            homes = sorted({home[name] for p in group["params"] if (name := self.names[id(p)]) in home})
            if not group["params"] and len(told["groups"]) == len(self.optimizer.param_groups):
                homes = [index]  # other stages have its parameters
            options = [encoding.decode(told["groups"][one]["options"], given(saved, self._device())) for one in homes]
            if any(not encoding.same(one, options[0]) for one in options[1:]):
                return (f"{self.key}: group {index} has parameters of the checkpoint's groups "
                        f"{', '.join(map(str, homes))}, whose options differ: make the groups as they were saved")
            own = {key: value for key, value in group.items() if key not in (*OWN, *STEPPED)}
            loaded = options[0] if options else {}
            if not isinstance(self.inner, Optimizer):
                kept = {key: value for key, value in loaded.items() if key in DEFAULTS}
                if not is_plain(kept):
                    return (f"{self.key}: the checkpoint's was kept with {describe(kept)}, which torch's "
                            f"{self.class_name} does not know: load it into fasttrain.optim.{self.class_name} with "
                            "these options, and convert that one's state dict (fasttrain.optim.convert)")
                loaded = {key: value for key, value in loaded.items() if key not in kept}
            made.append({**own, **loaded})
        return made

    def _device(self) -> torch.device | str:
        _, params = self._numbers()
        return next((p.device for p in params if p.device.type != "cpu"), "cpu")

    def _plain(self, saved: Saved, states: Mapping[str, Any], groups: list[dict[str, Any]], told: Mapping[str, Any],
               params: list[Any], numbers: Mapping[int, int]) -> tuple[list[tuple[str, Region]], Any]:
        """Reads, and what loads them: each process makes what it holds of every state."""
        reads: list[tuple[str, Region]] = []
        for p in params:
            name = self.names[id(p)]
            for one in encoding.references([states.get(name), told.get("digits", {}).get(name)]):
                reads += [(one["name"], part.region) for part in
                          parts_of(one["name"], home(one, p, saved, self.inner, "meta"), self.everyone)]

        def give_for(p: Any) -> Any:
            def give(one: Mapping[str, Any]) -> Any:
                held = home(one, p, saved, self.inner, "cpu" if one.get("host") else p.device)
                for part in parts_of(one["name"], held, self.everyone):
                    saved.read_into(part.memory, one["name"], part.region)
                return held
            return give

        def apply() -> None:
            state = {numbers[id(p)]: encoding.decode(states[name], give_for(p))
                     for p in params if (name := self.names[id(p)]) in states}
            more = encoding.decode(told.get("more", {}), given(saved, self._device()))
            self.optimizer.load_state_dict({**more, "state": {**state, **more.get("state", {})},
                                            "param_groups": fits.numbered(self.optimizer, groups)})
            for p in params:
                if (one := told.get("digits", {}).get(self.names[id(p)])) is not None:
                    self.inner._remainders[id(p)] = give_for(p)(one)
            if not isinstance(self.optimizer, Optimizer):
                self._restore_dtypes(state, params, numbers)

        return reads, apply

    def _restore_dtypes(self, state: Mapping[int, Any], params: list[Any], numbers: Mapping[int, int]) -> None:
        """torch casts floating-point states to their parameter's dtype: put those back that it changed."""
        for p in params:
            for key, value in state.get(numbers[id(p)], {}).items():
                loaded = self.optimizer.state[p].get(key)
                if isinstance(value, Tensor) and isinstance(loaded, Tensor) and loaded.dtype != value.dtype \
                        and key != "step":
                    self.optimizer.state[p][key] = value.to(p.device)
