"""State that goes out and comes back: state dicts with every state in its own dtype, and weights in full precision."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fasttrain.optim import drive, kept, statedict
from fasttrain.optim.groups import Groups
from fasttrain.optim.page import Group


class Saved(Groups):
    """Loads and saves what the groups keep; what a state dict must have is in `fasttrain.optim.statedict`."""

    _loading: Mapping[str, Any] | None = None

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
        if (host := self._on_host()) is not None:
            return host.as_it_is().full_precision()
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
        if (host := self._on_host()) is not None:
            with torch.no_grad():
                host.load_full_precision(weights)
            return
        with torch.no_grad():
            for where, value in zip(places, weights, strict=True):
                p, group = self._param(where), self.param_groups[where[0]]
                made = kept.set_full_precision(self._name(where), p, value, self.state.get(p, {}), group)
                if made is not None:
                    self._remainders[id(p)] = made
                self._versions[id(p)] = p._version

    def state_dict(self) -> dict[str, Any]:
        """As torch's; counts of draws that the device has are read, and so is which parameters were never stepped."""
        saved: dict[str, Any] = super().state_dict()
        for group in saved["param_groups"]:
            for name in ("draws", *self.running_of_groups):
                if isinstance(group.get(name), Tensor):
                    group[name] = int(group[name]) if name in ("draws", "k") else float(group[name])
        skipped = {id(p) for p in drive.unstepped(self)}
        params = [p for group in self.param_groups for p in group["params"]]
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        for number, p in zip(numbers, params, strict=True):
            if id(p) in skipped:
                del saved["state"][number]
        return saved

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
        if (host := self._on_host()) is not None:
            self.__setstate__(host.load_state_dict(state_dict))
            for after in self._optimizer_load_state_dict_post_hooks.values():
                after(self)
            return
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
        self._plan, self._afar, self._planned_for = None, None, None
        self._versions, self._remainders, self._arrived, self._clip = {}, {}, set(), 1.0
        self._drive = drive.after(self._drive)
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
        kept = {"backend": self.backend, "offload": self.offload, "offload_bucket": self.offload_bucket,
                "_storage": self._storage, "_capturable": self._capturable}
        state = super().__getstate__()
        if skipped := {id(p) for p in drive.unstepped(self)}:
            state["state"] = defaultdict(dict, {p: own for p, own in self.state.items() if id(p) not in skipped})
        return {**state, **kept}  # no plan, no hooks
