"""States of ZeRO that go out and come back: as those of the optimizer that is not divided."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttrain.dist.slots import dtype_name
from fasttrain.dist.wire import as_bytes
from fasttrain.kernels.item import order
from fasttrain.kernels.pack import view_of
from fasttrain.optim import statedict
from fasttrain.optim.local import as_whole, local, part_of, shares, whole_of
from fasttrain.optim.placing import place
from fasttrain.parallel.zero_pieces import Piece, Place, slot_of
from fasttrain.precision.codecs import PLAIN, array_shapes, codec
from fasttrain.precision.storage import is_plain


class Array(NamedTuple):
    """A state with something for each element of a parameter: the first or the second array of a codec."""

    number: int
    second: bool

    def shape(self, whole: torch.Size) -> tuple[int, ...]:
        found = array_shapes(self.number, whole)[self.second]
        assert found is not None
        return found

    def length(self, elements: int) -> int:
        """Its length for the first so many elements."""
        return math.prod(self.shape(torch.Size([elements])))


def arrays(zero: Any, where: Place) -> dict[str, Array]:
    """The states of a divided parameter that are cut as it is; all others are the same on every rank."""
    if not zero.divided:
        return {}
    pattern, group = zero._pattern, zero.param_groups[where[0]]
    rule, p = pattern.rule_of(group), zero._pattern._param(where)
    if is_plain(group):
        return {name: Array(PLAIN[torch.float32], False) for name in rule.state}
    layout = pattern._layout("a parameter", p, p.dtype, group, rule)
    return {name: Array(number, bool(second))
            for number, *names in zip(layout.codecs, layout.keys, layout.extras, strict=True)
            for second, name in enumerate(names) if name is not None}


# --- Out --------------------------------------------------------------------------------------------------------------

def consolidate(zero: Any, to: int | None) -> dict[str, Any]:
    """The whole state dict on one rank, or on all (None). Buckets follow one another, so that no rank has all twice."""
    goal = Goal(zero.reducer, to)
    wires = {group: one.wire for group, one in zero.method.divided.items()}
    mine = json.dumps([_told(piece, zero.inner.state.get(piece.param, {})) for piece in zero._pieces])
    manifests = {group: [json.loads(text) for text in wires[group].gather_objects_json(mine)]
                 for group in sorted(wires, key=lambda group: (wires[group].ranks, group))}
    state: dict[Place, dict[str, Any]] = {}
    for index, bucket in enumerate(zero.reducer.buckets):
        told = [[one for one in manifest if one["bucket"] == index] for manifest in manifests[bucket.plan.group]]
        found: dict[Place, dict[str, Any]] = {}
        _bring(zero, index, told, goal, found)
        for where in sorted(found):
            whole = _joined(zero, where, found[where])
            if goal.here:
                state[where] = whole
    if not goal.here:
        return {}
    numbers = {where: number for number, where in enumerate(
        (g, i) for g, group in enumerate(zero.param_groups) for i in range(len(group["params"])))}
    groups = [{**{key: value for key, value in group.items() if key != "params"},
               "params": [numbers[g, i] for i in range(len(group["params"]))]}
              for g, group in enumerate(zero.param_groups)]
    return {"state": {numbers[where]: state[where] for where in sorted(state)}, "param_groups": groups}


class Goal:
    """Where wholes go.

    Arguments:
        to: the rank that gets them; None: all.

    Attributes:
        here: this rank does.
        to: the rank in each group that gathers what its ranks have; None: all, so that parts can be joined then.

    Raises:
        ValueError: there is no such rank.
        RuntimeError: stages of a pipeline have different parameters, and none has all.
    """

    def __init__(self, reducer: Any, to: int | None):
        mesh, wire = reducer.reach.mesh, reducer.wire
        size, rank = (wire.size, wire.rank) if mesh is None else (mesh.size, mesh.rank)
        if to is not None and not 0 <= to < size:
            raise ValueError(f"to={to}: the mesh has ranks 0 to {size - 1}; None for all")
        if mesh is not None and mesh.sizes["pipeline"] > 1:
            raise RuntimeError("the stages of a pipeline step different parameters, and no rank brings all together: "
                               "save and load with fasttrain.checkpoint.Checkpointer, whose checkpoints load under any "
                               "other mesh, in one process too")
        self.here, self.to = to is None or rank == to, to if mesh is None else None


def _bring(zero: Any, index: int, told: Sequence[Sequence[Mapping[str, Any]]], goal: Goal,
           found: dict[Place, dict[str, Any]]) -> None:
    """Gather the states of a bucket's parameters, as far as the ranks of its group hold them."""
    wire = zero.method.divided[zero.reducer.buckets[index].plan.group].wire
    sends = [as_bytes(value.contiguous()) for piece in zero._pieces if piece.bucket == index
             for value in zero.inner.state.get(piece.param, {}).values() if isinstance(value, Tensor)]
    nothing = torch.empty(0, dtype=torch.uint8, device=wire.device)
    sent = torch.cat([one.to(wire.device) for one in sends]) if sends else nothing
    here = goal.to is None or wire.rank == goal.to
    came = [torch.empty(sum(map(_bytes, one)) if here else 0, dtype=torch.uint8, device=wire.device) for one in told]
    wire.all_to_all(came, [sent if goal.to in (None, rank) else nothing for rank in range(wire.size)]).wait()
    if here:
        for data, manifest in zip(came, told, strict=True):
            _assemble(zero, found, data, manifest)


def _joined(zero: Any, where: Place, state: dict[str, Any]) -> dict[str, Any]:
    """The states of a parameter of which ranks along other axes hold other parts."""
    p, known = zero.param_groups[where[0]]["params"][where[1]], arrays(zero, where)
    if not shares(p):
        return state
    return {key: whole_of(as_whole(value.contiguous(), p)) if key in known else value for key, value in state.items()}


def _told(piece: Piece, state: Mapping[str, Any]) -> dict[str, Any]:
    """What the others must know of a piece to read its states."""
    told: list[dict[str, Any]] = []
    for key, value in state.items():
        if isinstance(value, Tensor):
            told.append({"key": key, "dtype": dtype_name(value.dtype), "shape": list(value.shape),
                         "stride": list(value.stride()) if order(value) is not None else None})
        elif value is None or isinstance(value, (bool, int, float, str)):
            told.append({"key": key, "value": value})
        else:
            raise TypeError(f"{piece.name}: its state {key!r} is a {type(value).__name__}, which cannot be brought to "
                            "another rank: only tensors, numbers and texts can")
    return {"where": piece.where, "bucket": piece.bucket, "first": piece.first, "numel": piece.numel, "state": told}


def _bytes(told: Mapping[str, Any]) -> int:
    return sum(math.prod(one["shape"]) * getattr(torch, one["dtype"]).itemsize
               for one in told["state"] if "dtype" in one)


def _assemble(zero: Any, state: dict[Place, dict[str, Any]], data: Tensor,
              manifest: Sequence[Mapping[str, Any]]) -> None:
    """Put what one rank sent of a bucket into its places."""
    start = 0
    for told in manifest:
        where = tuple(told["where"])
        p, known = zero.param_groups[where[0]]["params"][where[1]], arrays(zero, where)
        if not told["state"]:
            continue
        whole = state.setdefault(where, {})
        for one in told["state"]:
            key = one["key"]
            if "dtype" not in one:
                whole[key] = one["value"]
                continue
            dtype = getattr(torch, one["dtype"])
            size = math.prod(one["shape"]) * dtype.itemsize
            values = data[start : start + size].clone().view(dtype)  # a start of its own, which every dtype fits
            start += size
            if key not in known:
                shaped = values.view(one["shape"])
                whole[key] = shaped if one["stride"] is None else torch.empty_strided(
                    one["shape"], one["stride"], dtype=dtype, device=values.device).copy_(shaped)
                continue
            if key not in whole:
                whole[key] = _empty(local(p.detach()), known[key], dtype, values.device)
            first = known[key].length(told["first"])
            _flat(whole[key])[first : first + len(values)] = values


def _empty(p: Tensor, array: Array, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A state of the whole parameter, in the order of a slot."""
    flat = torch.zeros(math.prod(array.shape(p.shape)), dtype=dtype, device=device)
    if codec(array.number).block:
        return flat.view(array.shape(p.shape))
    return view_of(flat, p.detach(), 0)


def _flat(whole: Tensor) -> Tensor:
    return torch.as_strided(whole, (whole.numel(),), (1,))


# --- In ---------------------------------------------------------------------------------------------------------------

def load(zero: Any, state_dict: Mapping[str, Any]) -> None:
    """Cut a whole state dict into this rank's pieces. Nothing is sent."""
    groups, saved_groups = zero.param_groups, state_dict.get("param_groups", [])
    counts, saved_counts = ([len(group["params"]) for group in given] for given in (groups, saved_groups))
    if counts != saved_counts:
        raise ValueError(f"the state dict has groups of {saved_counts} parameters, and Zero of {counts}: is it of "
                         "another model, or of one rank only? Give what consolidate() or an optimizer's state_dict() "
                         "returned")
    if zero._pattern is not None:
        statedict.check(zero._pattern, state_dict)
    state, inner_groups = {}, []
    numbers = {id(piece.param): number for number, piece in enumerate(zero._pieces)}
    for index, saved in enumerate(saved_groups):
        mine = [piece for piece in zero._pieces if piece.where[0] == index]
        options = {key: value for key, value in saved.items() if key not in ("params", "param_names")}
        inner_groups.append({**options, "params": [numbers[id(piece.param)] for piece in mine]})
        for piece in mine:
            if found := state_dict["state"].get(saved["params"][piece.where[1]]):
                known = arrays(zero, piece.where)
                state[numbers[id(piece.param)]] = {
                    key: _cut(value, piece, known.get(key)) for key, value in found.items()}
    zero.inner.load_state_dict({"state": state, "param_groups": inner_groups})
    zero._pull()


def _cut(value: Any, piece: Piece, array: Array | None) -> Any:
    if not isinstance(value, Tensor):
        return value
    if array is None:
        return value.clone()
    if codec(array.number).block:
        begin = array.length(place(piece.name, piece.whole)[0])  # whole blocks follow one another in what is held
        flat = value.reshape(-1)[begin : begin + array.length(piece.held.numel())]
    else:
        flat = slot_of(part_of(value, piece.whole), piece)
    return flat[array.length(piece.first) : array.length(piece.first + piece.numel)].clone()
