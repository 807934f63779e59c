"""What compares an optimizer's tensors at every step: the compiled one finds what the naive one finds."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import needs_native
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn import Parameter

from fasttrain.optim.roster import Both, Roster, compiled

SHAPES = ((4, 6), (7,), (), (0, 3), (1, 5), (3, 2, 2))
KEYS = ("exp_avg", "step")
Change = Callable[[Tensor, dict[Any, Any]], None]
pytestmark = needs_native


class Marked(Tensor):
    """A subclass, of which only Python knows what it holds."""


def new_gradient(p: Tensor, state: dict[Any, Any]) -> None:
    p.grad = None
    p.grad = torch.randn_like(p)


def no_gradient(p: Tensor, state: dict[Any, Any]) -> None:
    p.grad = None


def other_dtype(p: Tensor, state: dict[Any, Any]) -> None:
    p.grad = None
    p.grad_dtype = None
    p.grad = torch.randn_like(p, dtype=torch.bfloat16)


def other_strides(p: Tensor, state: dict[Any, Any]) -> None:
    new_gradient(p, state)
    if p.ndim == 2:
        p.grad = p.grad.t().contiguous().t()


def sparse(p: Tensor, state: dict[Any, Any]) -> None:
    p.grad = torch.randn(p.shape).to_sparse() if p.ndim else torch.randn(())


def negated(p: Tensor, state: dict[Any, Any]) -> None:
    p.grad = torch._neg_view(torch.randn_like(p))


def marked(p: Tensor, state: dict[Any, Any]) -> None:
    p.grad = torch.randn_like(p).as_subclass(Marked)


def moved(p: Tensor, state: dict[Any, Any]) -> None:
    p.data = p.detach().clone()


def resized(p: Tensor, state: dict[Any, Any]) -> None:
    p.grad = None
    p.data = torch.randn(*p.shape, 2)
    new_gradient(p, state)


def new_entry(p: Tensor, state: dict[Any, Any]) -> None:
    state[p]["exp_avg"] = torch.zeros_like(p)


def entry_moved(p: Tensor, state: dict[Any, Any]) -> None:
    if "exp_avg" in state[p]:
        state[p]["exp_avg"].data = state[p]["exp_avg"].clone()


def loaded(p: Tensor, state: dict[Any, Any]) -> None:
    state[p] = dict(state[p])


def gone(p: Tensor, state: dict[Any, Any]) -> None:
    state[p].pop("exp_avg", None)


def other_count(p: Tensor, state: dict[Any, Any]) -> None:
    state[p]["step"] = torch.tensor(random.choice([3.0, 8.0]))


def written(p: Tensor, state: dict[Any, Any]) -> None:
    with torch.no_grad():
        p.add_(1)


CHANGES: list[Change] = [new_gradient, no_gradient, other_dtype, other_strides, sparse, negated, marked, moved, resized,
                         new_entry, entry_moved, loaded, gone, other_count, written]


def made(mesh: Any = None) -> tuple[list[list[Tensor]], dict[Any, Any]]:
    def tensor(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape) if mesh is None else DTensor.from_local(torch.randn(shape), mesh, [Replicate()])

    params: list[Tensor] = [Parameter(tensor(shape)) for shape in SHAPES]
    for p in params:
        p.grad = torch.randn_like(p)
    state = {p: {"exp_avg": torch.zeros_like(p), "step": torch.tensor(2.0)} for p in params}
    return [params[:4], params[4:]], state


def told(rosters: list[Any], index: int, p: Tensor, state: dict[Any, Any]) -> list[bool]:
    own = state.setdefault(p, {})
    if not isinstance(own.get("exp_avg"), Tensor) or own["exp_avg"].shape != p.shape:
        own["exp_avg"] = torch.zeros_like(p)
    own.setdefault("step", torch.tensor(0.0))
    return [one.set(index, own, KEYS, counted=True, fresh=index % 2 == 0, watched=index == 1) for one in rosters]


@pytest.mark.parametrize("seed", range(6))
def test_both_find_the_same(seed: int) -> None:
    """After every change: the same attention, gradients' addresses, rows; and each is told of what it asks for."""
    random.seed(seed)
    torch.manual_seed(seed)
    groups, state = made()
    params = [p for own in groups for p in own]
    rosters = [compiled(groups), Roster(groups)]
    assert not isinstance(rosters[0], Roster)
    found = set()
    for turn in range(120):
        change = random.choice(CHANGES) if turn else new_gradient
        p = random.choice(params)
        if p.grad is not None or change is not marked:
            change(p, state)
        attention = [one.scan(state, groups) for one in rosters]
        assert attention[0] == attention[1], change
        if attention[0] and turn:
            found.add(change)
        for index in attention[0]:
            answers = told(rosters, index, params[index], state)
            assert answers[0] == answers[1], change
        assert rosters[0].active() == rosters[1].active()
        assert rosters[0].addresses().tolist() == rosters[1].addresses().tolist()
        rows = [one.rows() for one in rosters]
        assert [tuple(row) for row in rows[0][0]] == rows[1][0]
        assert rows[0][1].tolist() == rows[1][1].tolist()
        assert [one.version(1) for one in rosters] == [rosters[0].version(1)] * 2
        if not attention[0]:
            assert sum(rosters[0].active()) == sum(p.grad is not None for p in params)
    assert len(found) >= 8


def test_after_a_step_counts_and_versions_are_one_more() -> None:
    groups, state = made()
    params = [p for own in groups for p in own]
    params[2].grad = None
    for one in (compiled(groups), Roster(groups)):
        assert one.scan(state, groups) == [0, 1, 3, 4, 5]
        for index in (0, 1, 3, 4, 5):
            assert told([one], index, params[index], state) == [True]
        tensors = [tensor for p in params for tensor in (p, *state[p].values())]
        before = [tensor._version for tensor in tensors]
        counts = [float(state[p]["step"]) for p in params]
        one.stepped(torch.autograd.graph.increment_version)
        assert [tensor._version - old for tensor, old in zip(tensors, before, strict=True)] == [
            0 if index // 3 == 2 else 1 for index in range(len(tensors))]
        assert [float(state[p]["step"]) - old for p, old in zip(params, counts, strict=True)] == [1, 1, 0, 1, 1, 1]
        assert one.scan(state, groups) == [1], "its version is watched, and was not taken"
        assert one.again(1, state) is False
        told([one], 1, params[1], state)
        one.stepped(torch.autograd.graph.increment_version)
        one.remember()
        assert one.scan(state, groups) == []


def test_gradients_are_held_from_scan_to_release() -> None:
    groups, state = made()
    params = [p for own in groups for p in own]
    for one in (compiled(groups), Roster(groups)):
        for index, p in enumerate(params):
            told([one], index, p, state)
        one.scan(state, groups)
        reference = weakref.ref(params[0].grad)
        params[0].grad = None
        assert reference() is not None
        one.release()
        assert reference() is None
        params[0].grad = torch.randn_like(params[0])


def test_other_lists() -> None:
    groups, state = made()
    for one in (compiled(groups), Roster(groups)):
        assert one.scan(state, groups[:1]) is None
        assert one.scan(state, [groups[0][::-1], groups[1]]) is None
        assert one.scan(state, [groups[0], [*groups[1], groups[0][0]]]) is None


def test_what_only_python_can_read() -> None:
    """A subclass is known to `Both`, whose addresses are in the order of the parameters."""
    groups, state = made()
    params = [p for own in groups for p in own]
    params[4].grad = torch.randn_like(params[4]).as_subclass(Marked)
    both = Both(groups)
    for index in both.scan(state, groups):
        assert told([both], index, params[index], state) == [True]
    assert both.scan(state, groups) == []
    assert both.addresses().tolist() == [p.grad.data_ptr() for p in params]
    params[4].grad = torch.randn_like(params[4]).as_subclass(Marked)
    assert both.scan(state, groups) == []
    assert both.addresses().tolist() == [p.grad.data_ptr() for p in params]
    params[4].grad = torch.randn(5, 1).t().as_subclass(Marked)
    params[4].data = params[4].detach().clone()
    assert both.scan(state, groups) == [4]
    assert both.active() == b"\1\1\1\1\0\1"


@pytest.fixture
def mesh() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_shards(mesh: Any) -> None:
    """Local parts are compared; a gradient that is placed in another way is not the parameter's."""
    groups, state = made(mesh)
    params = [p for own in groups for p in own]
    rosters = [compiled(groups), Roster(groups)]
    for index, p in enumerate(params):
        assert told(rosters, index, p, state) == [True, True]
    local = torch.randn(4, 6)
    changes: list[tuple[int, Callable[[], None]]] = [
        (0, lambda: setattr(params[0], "grad", DTensor.from_local(local, mesh, [Shard(0)], run_check=False))),
        (1, lambda: setattr(params[1], "_local_tensor", torch.randn(7))),
        (5, lambda: state[params[5]].update(exp_avg=torch.zeros_like(params[5])))]
    for p in params:
        p.grad = torch.randn_like(p)  # of another address
    for changed in (None, *changes):
        if changed is not None:
            changed[1]()
        for one in rosters:
            assert one.scan(state, groups) == ([] if changed is None else [changed[0]]), changed
        if changed is None:
            wanted = [p.grad._local_tensor.data_ptr() for p in params]
            assert all(one.addresses().tolist() == wanted for one in rosters)
        else:
            params[changed[0]].grad = torch.randn_like(params[changed[0]])
            told(rosters, changed[0], params[changed[0]], state)
