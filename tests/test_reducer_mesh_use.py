"""What a reducer on a mesh is used for: steps, scales, bad gradients, copies; and what it refuses."""

import copy
import itertools
import warnings

import pytest
import torch
from ranks import run
from test_reducer_groups import Kinds, elements, ones, parallel_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fasttrain import LossScaler
from fasttrain.dist.mesh import Mesh
from fasttrain.optim import SGD, AdamW
from fasttrain.optim.local import is_dtensor, local
from fasttrain.parallel import DataParallel, Reducer
from fasttrain.parallel.wires import Ordered, Same


def stepped(wire, sizes):
    """Fused steps on gradients in buckets, vouched for or not, are those of torch on the same gradients."""
    mesh = Mesh(**sizes)
    parallel, plain = parallel_of(mesh), [nn.Parameter(local(p.detach()).clone()) for p in Kinds(mesh).parameters()]
    optimizer, reference = AdamW(parallel.parameters(), lr=0.1), torch.optim.AdamW(plain, lr=0.1)
    vouched = []
    for _ in range(4):
        ones(parallel)
        vouched.append(parallel.reducer.vouch(optimizer))
        optimizer.step()
        parallel.zero_grad()
        for p in plain:
            p.grad = torch.ones_like(p)
        reference.step()
    for p, q in zip(parallel.parameters(), plain, strict=True):
        torch.testing.assert_close(local(p.detach()), q.detach())
    return vouched


def test_steps():
    assert run(stepped, 4, dict(data=2, tensor=2)) == [[True] * 4] * 4


def overflown(wire, sizes):
    """One rank's gradient is not finite: every rank of every stage skips the step, and in the second bad one all know
    whose it is."""
    mesh = Mesh(**sizes)
    parallel = parallel_of(mesh)
    reducer, scaler = parallel.reducer, LossScaler(init_scale=4.0)
    optimizer = SGD(parallel.parameters(), lr=1.0)
    found = []
    for bad in (True, True, False):
        handle = parallel.module.plain.register_hook(lambda grad: grad * torch.inf) if bad and wire.rank == 3 else None
        parallel.count(2)
        ones(parallel)
        parallel.step(optimizer, 1.0, scaler)
        if handle is not None:
            handle.remove()
        found.append((reducer.last.nonfinite > 0, scaler.get_scale(), bool(local(parallel.module.plain).any())))
        parallel.zero_grad()
    return found, reducer.culprits, reducer.last.tokens


def test_a_bad_gradient_on_one_rank():
    answers = run(overflown, 4, dict(pipeline=2, tensor=2))
    assert answers[0][0] == [(True, 2.0, False), (True, 1.0, False), (False, 1.0, True)]
    assert all(answer == answers[0] for answer in answers)
    assert answers[0][1:] == ({3: ["plain"]}, 2)


def nothing_here(wire):
    """A stage that trains nothing answers the others."""
    mesh = Mesh(pipeline=2)
    model = nn.Linear(2, 2) if wire.rank == 0 else nn.Identity()
    parallel = DataParallel(model, mesh=mesh)
    for _ in range(2):
        parallel.reducer.loss = 3.0
        with parallel.reducer.paused():
            if wire.rank == 0:
                sum(p.sum() for p in model.parameters()).backward()
        parallel.reducer.reduce()
        parallel.finish()
        parallel.zero_grad()
    return parallel.grad_norm().item() ** 2, parallel.reducer.last.loss, parallel.reducer.known.loss


def test_a_stage_without_parameters():
    assert run(nothing_here, 2) == [pytest.approx((6.0, 3.0, 3.0))] * 2


def alone(wire):
    """One process: nothing travels, and gradients stay where they are."""
    mesh = Mesh()
    parallel = parallel_of(mesh)
    ones(parallel)
    with parallel.reducer.paused():
        parallel.reducer.reduce()
    parallel.finish()
    assert parallel.reducer.idle
    return parallel.reducer.statistics()[0].item() == elements(mesh) and not parallel.reducer.sent


def test_one_process():
    assert run(alone, 1) == [True]


def data_only(wire):
    """One axis is what it was without a mesh: one wire, one all-reduce a bucket, one for all."""
    parallel = DataParallel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), mesh=Mesh(), bucket_cap_mb=0.0001)
    reducer = parallel.reducer
    calls = sum(reducer.wire.calls.values())
    parallel(torch.ones(2, 4)).sum().backward()
    assert reducer.reach.everyone == [reducer.wire]
    assert type(reducer.method) is Same
    assert {type(bucket).__name__ for bucket in reducer.buckets} == {"Bucket"}
    assert sum(reducer.wire.calls.values()) - calls == len(reducer.buckets) + 1 > 2
    assert reducer.sent == reducer.wire.sent
    return len(reducer._hooks)


def test_an_axis_alone_costs_what_it_did():
    assert run(data_only, 2) == [4, 4]


def travels(wire, sizes, kind):
    """What a step sends beside its control (an all-gather on gloo), and the formula."""
    parallel = parallel_of(Mesh(**sizes), wire=kind)
    reducer, counted = parallel.reducer, []
    for _ in range(2):
        ones(parallel)
        parallel.zero_grad()
        counted.append((reducer.sent, sum(wire.bytes["all_gather"] for wire in reducer.reach.everyone)))
    (sent, gathered), (later, gathered_later) = counted
    return later - sent - (gathered_later - gathered), reducer.bytes_per_step()


@pytest.mark.parametrize("kind", ["same", "ordered", "bf16", "int8"])
def test_bytes(kind):
    for sent, formula in run(travels, 4, dict(expert=2, tensor=2), kind):
        assert sent == formula > 0


def kept(wire, how):
    """What codes lack is a state: of this rank, and of this mesh."""
    parallel = parallel_of(Mesh(expert=2, tensor=2), wire="int8")
    method = parallel.reducer.method
    torch.manual_seed(wire.rank)
    held = [p.to_local() if is_dtensor(p) else p for p in parallel.parameters()]
    sum((one * torch.randn(one.shape)).sum() for one in held).backward()
    state = copy.deepcopy(method.state_dict())
    found = {group: sum(residual.abs().sum().item() for residual in own["residuals"])
             for group, own in state["groups"].items()}
    for own in method.methods.values():
        for residual in getattr(own, "residuals", ()):
            residual.fill_(torch.nan)
    if how == "same":
        method.of_rank(state, wire.rank, 4)
        after = method.state_dict()["groups"]
        return found, all(a.equal(b) for group, own in state["groups"].items()
                          for a, b in zip(own["residuals"], after[group]["residuals"], strict=True))
    state["mesh"]["tensor"], state["mesh"]["data"] = 1, 2
    with pytest.raises(ValueError, match="on a mesh of"):
        method.load_state_dict(state)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        method.of_rank(state, wire.rank, 4)
    return [str(one.message) for one in told], all(
        not residual.any() for own in method.state_dict()["groups"].values() for residual in own["residuals"])


def test_residuals_are_kept():
    for found, equal in run(kept, 4, "same"):
        assert equal
        assert set(found) == {"data", "data and tensor", "data copied over tensor"}  # an expert's group is one rank
        assert all(found.values())


def test_residuals_of_another_mesh():
    answers = run(kept, 4, "other")
    assert all(zero for _, zero in answers)
    assert [len(told) for told, _ in answers] == [1, 0, 0, 0]
    assert "begins anew" in answers[0][0][0]


def copied(wire):
    """A deep copy reduces over the same mesh."""
    mesh = Mesh(data=2, tensor=2)
    model = Kinds(mesh)
    parallel = DataParallel(model, mesh=mesh)
    twin = copy.deepcopy(parallel)
    assert twin.reducer.reach.mesh is mesh
    assert twin.reducer.reach.group == parallel.reducer.reach.group
    ones(twin)
    return twin.grad_norm().item() ** 2


def test_copies():
    assert run(copied, 4) == [pytest.approx(elements_of(2))] * 4


def elements_of(tensor):
    return 21 + 48 + 1000 + 9 + 4 + 11 + 24 + 40


def shared(wire):
    """Construction gives equal weights to whoever holds the same, and leaves what is another rank's own."""
    mesh = Mesh(expert=2, tensor=2)
    model = Kinds(mesh)
    for p in model.parameters():
        local(p.data).fill_(1.0 + wire.rank)
    model.register_buffer("seen", torch.full((2,), 1.0 + wire.rank))
    DataParallel(model, mesh=mesh)
    return {name: local(t.detach()).flatten()[0].item() for name, t in itertools.chain(
        model.named_parameters(), model.named_buffers())}


def test_what_is_made_equal():
    """Ranks 0 and 1 are of one expert, 0 and 2 of one tensor coordinate."""
    answers = run(shared, 4)
    for name, first in {"plain": [1, 1, 1, 1], "norm": [1, 1, 1, 1], "copied": [1, 1, 1, 1], "columns": [1, 2, 1, 2],
                        "experts": [1, 1, 3, 3], "cut_experts": [1, 2, 3, 4], "seen": [1, 2, 1, 2]}.items():
        assert [answer[name] for answer in answers] == first, name


def in_float32(wire):
    """Parameters of 16 bits whose gradients add up in 32."""
    mesh = Mesh(data=2, tensor=2)
    torch.manual_seed(0)
    parallel = DataParallel(Kinds(mesh, torch.bfloat16), mesh=mesh, grad_dtype=torch.float32)
    with parallel.no_sync():
        ones(parallel, 3)
    ones(parallel, 3)
    ones(parallel, 3)
    return {str(local(p.grad).dtype) for p in parallel.parameters()}, parallel.grad_norm().item() ** 2


def test_a_dtype_for_gradients():
    for dtypes, squares in run(in_float32, 4):
        assert dtypes == {"torch.float32"}
        assert squares == pytest.approx(elements_of(2), rel=0.02)  # thirds in bfloat16


def refused(wire):
    mesh = Mesh(data=2, tensor=2)
    model = Kinds(mesh)

    def words(make):
        with pytest.raises((ValueError, RuntimeError, TypeError)) as caught:
            make()
        return str(caught.value)

    other = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tensor", "rest"))["tensor"]
    sharded = nn.ParameterList([distribute_tensor(torch.zeros(4), mesh["data"], [Shard(0)])])
    unnamed = nn.ParameterList([distribute_tensor(torch.zeros(4), init_device_mesh("cpu", (4,)), [Shard(0)])])
    swapped = nn.ParameterList([distribute_tensor(torch.zeros(4), other, [Shard(0)])])
    named = lambda model: list(model.named_parameters())  # noqa: E731
    told = {
        "sharded": words(lambda: Reducer(named(sharded), mesh)),
        "unnamed": words(lambda: Reducer(named(unnamed), mesh)),
        "swapped": words(lambda: Reducer(named(swapped), mesh)),
        "without": words(lambda: Reducer(named(model))),
        "method": words(lambda: Reducer(named(model), mesh, wire=Ordered())),
        "no such": words(lambda: Reducer(named(model), mesh, wire="carrier pigeon")),
        "ties": words(lambda: Reducer(named(nn.Linear(2, 2)), wire_of(wire), tied={"weight": (0, 1)})),
        "stages": words(lambda: Reducer(named(model), mesh, tied={"plain": (0, 1)})),
    }
    parallel = DataParallel(model, mesh=mesh, wire=Ordered)
    assert {type(method) for method in parallel.reducer.method.methods.values()} == {Ordered}
    return told | {
        "join": words(parallel.join), "hook": words(lambda: parallel.register_comm_hook(None, print)),
        "again": words(lambda: Reducer(named(model), mesh)),
        "not ours": words(lambda: parallel.reducer.reduce([nn.Parameter(torch.zeros(3))]))}


def wire_of(wire):
    return wire


def test_what_is_refused():
    told = run(refused, 4)[0]
    for what, words in {
            "sharded": "lies on the axis 'data' of its mesh", "unnamed": "dimensions have no names",
            "swapped": "lies on ranks [0, 2] along 'tensor', and the mesh has [0, 1]",
            "without": "is a DTensor, divided over some ranks: give the Mesh",
            "method": "serves one group of ranks, and on this mesh there are data", "no such": "same, ordered, bf16",
            "ties": "give the Mesh that has them", "stages": "tied across stages [0, 1]: give numbers of the 1 stages",
            "join": "give every rank as many batches", "hook": "serves one group", "again": "is reduced already",
            "not ours": "is not one of the"}.items():
        assert words in told[what], (what, told[what])
