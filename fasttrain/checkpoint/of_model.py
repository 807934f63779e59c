"""A model as an entry of a state: its parameters and buffers under their names in the original model."""

from __future__ import annotations

from collections.abc import Mapping, Set
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fasttrain.checkpoint import encoding
from fasttrain.checkpoint.names import bare, names_in, stages_of_whole, ties_of_whole
from fasttrain.checkpoint.parts import DTYPES, Among, Part, first_writes, need_memory, parts_of, tensor_of
from fasttrain.checkpoint.problems import Problem
from fasttrain.checkpoint.saved import Plan, Saved, given, refuse, whole_reads
from fasttrain.checkpoint.stages import Held
from fasttrain.checkpoint.together import told_of
from fasttrain.optim.local import local

EXTRA = nn.modules.module._EXTRA_STATE_KEY_SUFFIX  # what `get_extra_state` gives: of any shape, if it is a tensor


class OfModel:
    """A module of any wrapping: data parallel, compiled, checkpoint-wrapped, `fully_shard`-ed.

    Tied parameters are saved once; the other names are told. Parameters that all ranks hold are divided over them;
    buffers, which may differ, are those of the first rank, as data parallelism has it. A pipeline's stage is a module
    that has some of the original's names.

    Arguments:
        key: of the entry.
        everyone: the ranks that hold the same.
    """

    def __init__(self, key: str, module: nn.Module, everyone: Among):
        self.key, self.module, self.everyone = key, bare(module), everyone

    def ties(self) -> dict[str, str]:
        """Other names of tensors that have one already."""
        return self._tensors[1]

    def held(self) -> Held:
        """What it holds."""
        tensors, others, rest = self._tensors
        return Held({**{f"{self.key}/{name}": value.numel() * value.element_size() for name, value in tensors.items()},
                     **{f"{self.key}/{name}": 0 for name in rest}}, [f"{self.key}/{name}" for name in others])

    @cached_property
    def _tensors(self) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
        """Tensors by name; other names of the same; extra state and what else is no tensor, by name."""
        state_dict = self.module.state_dict()
        names, ties = names_in(self.module, state_dict), ties_of_whole(self.module)
        tensors: dict[str, Any] = {}
        others: dict[str, str] = {}
        rest: dict[str, Any] = {}
        seen: dict[Any, str] = {}
        for raw, value in state_dict.items():
            name = names[raw]
            if not isinstance(value, Tensor) or name.rpartition(".")[2] == EXTRA:
                rest[name] = value
                continue
            need_memory(f"{self.key}/{name}", value)
            held = local(value)
            same = (held.data_ptr(), held.dtype, tuple(held.shape), held.stride(), tuple(value.shape))
            if held.numel() and same in seen:
                others[name] = seen[same]
                continue
            seen[same] = first = ties.get(name, name)
            tensors[first] = value
            if first != name:
                others[name] = first
        return tensors, others, rest

    def _parts(self, tensors: Mapping[str, Any]) -> dict[str, list[Part]]:
        named = [name for name, _ in self.module.named_parameters(remove_duplicate=False)]
        ties = ties_of_whole(self.module)
        learnt = {ties.get(name, name) for name in names_in(self.module, named).values()}
        found = {}
        for name, value in tensors.items():
            parts = parts_of(f"{self.key}/{name}", value, self.everyone)
            if name not in learnt:
                parts = [first_writes(part, self.everyone) for part in parts]
            found[name] = parts
        return found

    def save(self) -> tuple[list[Part], Any]:
        """Its parts here, and what the first rank tells beside them."""
        tensors, others, rest = self._tensors
        parts = [part for some in self._parts(tensors).values() for part in some]
        extra: list[Part] = []

        def take(path: str, value: Any) -> Mapping[str, Any]:
            name, value = f"{self.key}/{path}", tensor_of(f"{self.key}/{path}", value)
            extra.extend(first_writes(part, self.everyone) for part in parts_of(name, value, self.everyone))
            return {"name": name, **({"device": "cuda"} if value.is_cuda else {})}

        told = {"kind": "model", "same": others, "extra": encoding.encode(rest, take)}
        if stages := stages_of_whole(self.module):
            told["stages"] = [[number, names] for number, names in stages]
        return parts + extra, told

    def plan(self, saved: Saved, elsewhere: Set[str] = frozenset()) -> Plan:
        """How it would be loaded.

        Arguments:
            elsewhere: addresses that other stages of a pipeline hold.
        """
        told = told_of(saved, self.key)
        if not isinstance(told, Mapping) or told.get("kind") != "model":
            return refuse(f"{self.key}: the checkpoint has no model of this name")
        tensors, others, rest = self._tensors
        extra = encoding.references(told.get("extra", {}))
        there = {name.removeprefix(f"{self.key}/") for name in saved.names(self.key)}
        there -= {one["name"].removeprefix(f"{self.key}/") for one in extra}
        same: Mapping[str, str] = told.get("same", {})
        away = {name.removeprefix(f"{self.key}/") for name in elsewhere if name.startswith(f"{self.key}/")}
        away |= {same[name] for name in away if name in same}
        tied: dict[str, list[str]] = {name: [name] for name in tensors}
        for other, name in others.items():
            tied[name].append(other)
        chosen: dict[str, str] = {}
        missing, apart, torn = [], [], set[str]()
        for name, all_names in tied.items():
            homes = {one if one in there else same[one] for one in all_names if one in there or same.get(one) in there}
            missing += [f"{one} {tuple(tensors[name].shape)}" for one in all_names
                        if one not in there and same.get(one) not in there and not homes]
            if len(homes) > 1:
                apart.append(" and ".join(sorted(homes)))
                torn |= homes
            elif homes:
                chosen[name] = homes.pop()
        everything = {*tensors, *others, *away}
        unexpected = [f"{name} {saved.kinds[f'{self.key}/{name}'].shape}"
                      for name in sorted(there - set(chosen.values()) - away - torn)]
        unexpected += [f"{name} (the same as {of})" for name, of in same.items() if name not in everything
                       and of in chosen.values()]
        parts = self._parts({name: tensors[name] for name in chosen})
        different = []
        for name in parts:
            kind = saved.kinds[f"{self.key}/{chosen[name]}"]
            here = tuple(tensors[name].shape), DTYPES.get(tensors[name].dtype, str(tensors[name].dtype))
            if here != (kind.shape, kind.dtype):
                different.append(f"{name} {here[0]} {here[1]} (the checkpoint's is {kind.shape} {kind.dtype})")
        lost = sorted(set(rest) - set(told.get("extra", {})))
        unexpected += sorted(set(told.get("extra", {})) - set(rest) - away)
        problems = [Problem(f"{self.key}: {what}", tuple(names)) for what, names in (
            ("missing in the checkpoint", missing + lost), ("unexpected, the model has no", unexpected),
            ("different", different), ("tied in the model and apart in the checkpoint", apart)) if names]
        if problems:
            return refuse(*problems)
        reads = [(part, f"{self.key}/{chosen[name]}") for name, some in parts.items() for part in some]
        own_extra = {name: one for name, one in told.get("extra", {}).items() if name in rest}

        def apply() -> None:
            with torch.no_grad():
                for part, address in reads:
                    saved.read_into(part.memory, address, part.region)
            self._written(tensors, others, encoding.decode(
                own_extra, given(saved, next((p.device for p in self.module.parameters()), "cpu"))))

        return Plan([], [(address, part.region) for part, address in reads] + whole_reads(own_extra, saved), apply)

    def _written(self, tensors: Mapping[str, Any], others: Mapping[str, str], extra: Mapping[str, Any]) -> None:
        """Let everybody notice that the parameters were written; what lies elsewhere is handed to the module."""
        own = [*self.module.parameters(), *self.module.buffers()]
        torch.autograd.graph.increment_version([one for one in own if not one.is_inference()])
        places = {local(one).data_ptr() for one in own if local(one).numel()}
        copies = any(local(value).numel() and local(value).data_ptr() not in places for value in tensors.values())
        if not copies and not extra:
            return
        raw = {clean: name for name, clean in names_in(self.module, self.module.state_dict()).items()}
        whole = {raw[name]: value for name, value in tensors.items() if name in raw}
        whole |= {raw[other]: tensors[name] for other, name in others.items()}
        whole |= {raw[name]: value for name, value in extra.items()}
        self.module.load_state_dict(whole)
