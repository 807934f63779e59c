"""Everything else in a state: objects with a state dict, what each rank has of its own, and values."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor

from fasttrain.checkpoint import encoding
from fasttrain.checkpoint.parts import ALONE, Among, Part, first_writes, parts_of, tensor_of
from fasttrain.checkpoint.saved import Plan, Saved, given, refuse, whole_reads
from fasttrain.checkpoint.stages import Held
from fasttrain.checkpoint.together import tellers

SCHEDULED = ("lr", "initial_lr", "max_lr", "min_lr", "momentum", "base_momentum", "max_momentum", "betas",
             "weight_decay")  # options of groups that schedules write
LENGTHS = ("T_max", "T_0", "T_mult", "total_steps", "total_iters", "milestones", "_milestones", "step_size", "gamma",
           "power", "eta_min", "factor", "patience", "start_factor", "end_factor", "step_size_up", "step_size_down")


class PerRank:
    """Marks an object of which every rank has its own, as a data loader that counts its rank's batches.

    Arguments:
        of: an object with `state_dict` and `load_state_dict`.

    Example:
        state = {"model": model, "data": PerRank(loader)}
    """

    per_rank = True

    def __init__(self, of: Any):
        self.of = of

    def state_dict(self) -> Any:
        return self.of.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.of.load_state_dict(state)


def is_object(value: Any) -> bool:
    """Whether it keeps a state of its own."""
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


class OfObject:
    """An object with `state_dict` and `load_state_dict`: a schedule, a loss scaler, a loader, a guard.

    It is taken to be the same on every rank, and is loaded as the first rank had it; one that is not has an attribute
    `per_rank` that is true (`PerRank`). What was built for another optimizer writes its options when it is built
    (schedules of torch do): those that it may have written are saved with it and put back when it is loaded. They are
    those of the stage of the same number, if there were as many stages of a pipeline; else those that all stages had
    with as many groups.

    Arguments:
        key: of the entry.
        rank: this process's number.
        everyone: all processes.
        stage, stages: number of this process's stage of a pipeline, and how many there are.
    """

    def __init__(self, key: str, value: Any, rank: int, everyone: Among, stage: int = 0, stages: int = 1):
        self.key, self.value, self.rank, self.everyone = key, value, rank, everyone
        self.stage, self.stages = stage, stages
        self.per_rank = bool(getattr(value, "per_rank", False))

    def held(self) -> Held:
        """Nothing that one stage of a pipeline has and another has not."""
        return Held({}, [])

    def save(self) -> tuple[list[Part], Any]:
        """Its tensors here, and what this rank tells beside them."""
        parts: list[Part] = []
        state = self.value.state_dict()
        own = f"rank{self.rank}/" if self.per_rank else ""
        told = {"kind": "each" if self.per_rank else "object",
                "state": encoding.encode(state, taker(f"{self.key}/{own}", parts, self.everyone, self.per_rank))}
        if (groups := self._groups()) is not None:
            told["groups"] = [encoding.encode({key: _number(group[key]) for key in SCHEDULED if key in group})
                              for group in groups]
        return parts, told

    def _groups(self) -> list[dict[str, Any]] | None:
        optimizer = getattr(self.value, "optimizer", None)
        return optimizer.param_groups if isinstance(optimizer, torch.optim.Optimizer) else None

    def plan(self, saved: Saved, elsewhere: Set[str] = frozenset()) -> Plan:
        """How it would be loaded."""
        of = self.rank % saved.world if self.per_rank else self._of(saved)
        if of is None:
            return refuse(f"{self.key}: its optimizers had different options in the stages of the checkpoint's "
                          "pipeline, of which there were another number: give the optimizer of every stage all groups, "
                          "also those of which it has no parameters")
        told = saved.entry(self.key, of)
        if not isinstance(told, Mapping) or told.get("kind") not in ("object", "each"):
            return refuse(f"{self.key}: the checkpoint has no object of this name")
        if (told["kind"] == "each") != self.per_rank:
            was, now = ("one of its own", "the same") if told["kind"] == "each" else ("the same", "one of its own")
            return refuse(f"{self.key}: in the checkpoint every rank has {was}, and here {now} (PerRank)")
        if self.per_rank and saved.world != self.everyone.count and not hasattr(self.value, "of_rank"):
            return refuse(f"{self.key}: every rank has one of its own, and the checkpoint is of {saved.world} ranks, "
                          f"not {self.everyone.count}: leave it out of the state, and say where each rank begins")
        groups = self._groups()
        before = told.get("groups")
        if groups is not None and before is not None and len(groups) != len(before):
            return refuse(f"{self.key}: its optimizer has {len(groups)} groups, that of the checkpoint {len(before)}")
        if not self.per_rank:
            _compare(self.key, saved, of)

        def apply() -> None:
            state = encoding.decode(told["state"], given(saved, _device()))
            if groups is not None and (differ := _other_lengths(self.value.state_dict(), state)):
                warnings.warn(f"{self.key}: {'; '.join(differ)}: it goes on as the checkpoint has it. To change it, "
                              "leave the schedule out of the state, and set its step", stacklevel=6)
            if hasattr(self.value, "of_rank"):
                self.value.of_rank(state, self.rank, saved.world)
            else:
                self.value.load_state_dict(state)
            for group, options in zip(groups or (), before or (), strict=bool(groups and before)):
                for key, value in encoding.decode(options).items():
                    if isinstance(group.get(key), Tensor):
                        group[key].fill_(value)
                    else:
                        group[key] = value

        return Plan([], whole_reads(told["state"], saved), apply, order=2)

    def _of(self, saved: Saved) -> int | None:
        """The rank as which it is loaded; None if there are several answers."""
        if (groups := self._groups()) is None:
            return 0
        ranks = tellers(saved)
        fit = [rank for rank in ranks if len((saved.entry(self.key, rank) or {}).get("groups", ())) == len(groups)]
        if len(ranks) == self.stages and ranks[self.stage] in fit:
            return ranks[self.stage]
        if any(saved.entry(self.key, rank) != saved.entry(self.key, fit[0]) for rank in fit):
            return None
        return fit[0] if fit else ranks[0]


def _other_lengths(mine: Any, saved: Any) -> list[str]:
    """What a schedule was made with that is not what was saved: torch's take over what was saved without a word."""
    if not isinstance(mine, Mapping) or not isinstance(saved, Mapping):
        return []
    found = [f"{key} is {saved[key]!r} in the checkpoint and {mine[key]!r} here" for key in LENGTHS
             if key in mine and key in saved and mine[key] != saved[key]]
    for one, other in zip(mine.get("_schedulers", ()), saved.get("_schedulers", ()), strict=False):
        found += _other_lengths(one, other)
    return found


class OfValue:
    """A value of JSON's kinds, tuples and tensors among them. It is returned when it is loaded."""

    def __init__(self, key: str, value: Any, rank: int, everyone: Among):
        self.key, self.value, self.rank, self.everyone = key, value, rank, everyone

    def held(self) -> Held:
        """Nothing that one stage of a pipeline has and another has not."""
        return Held({}, [])

    def save(self) -> tuple[list[Part], Any]:
        parts: list[Part] = []
        told = encoding.encode(self.value, taker("", parts, self.everyone, False), self.key)
        return parts, {"kind": "value", "value": told}


def taker(prefix: str, parts: list[Part], everyone: Among, each: bool) -> encoding.Take:
    """For `encoding.encode`: gives tensors their addresses, and puts them into `parts`."""
    def take(path: str, value: Any) -> Mapping[str, Any]:
        name, value = f"{prefix}{path}", tensor_of(f"{prefix}{path}", value)
        among = ALONE if each else everyone
        parts.extend(first_writes(part, everyone) for part in parts_of(name, value, among))
        return {"name": name, **({"device": "cuda"} if value.is_cuda else {})}

    return take


def _device() -> torch.device | str:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"


def _number(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return tuple(map(_number, value)) if isinstance(value, (tuple, list)) else value


def _compare(key: str, saved: Saved, of: int) -> None:
    """Say it if the ranks had different ones: only that of rank `of` is loaded."""
    first = saved.entry(key, of)
    if "groups" in first and len(tellers(saved)) > 1:
        return  # each stage's has the options of its own optimizer
    others = [rank for rank in range(saved.world) if (told := saved.entry(key, rank)) is not None and told != first]
    if others:
        warnings.warn(f"{key} differed between ranks when it was saved ({of} and {', '.join(map(str, others[:8]))}), "
                      f"and is loaded as rank {of} had it on every rank; wrap it in fasttrain.checkpoint.PerRank if "
                      "each rank has its own", stacklevel=6)
