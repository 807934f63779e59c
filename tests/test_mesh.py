"""The grid of ranks: sizes, order, slices and wires, on every rank alike."""

import itertools
import math

import pytest
import torch
from ranks import run
from torch.distributed.device_mesh import init_device_mesh

from fasttrain.dist.mesh import AXES, MEAN, Mesh, filled


def looked_at(wire, sizes):
    mesh = Mesh(**sizes)
    groups = {axes: mesh.ranks(*axes) for n in range(1, 4) for axes in itertools.combinations(AXES, n)}
    sums = {axes: mesh.wire(*axes).sum_(torch.tensor(float(mesh.rank))).item() for axes in groups}
    slices = {axis: sorted(mesh[axis].mesh.flatten().tolist()) for axis in AXES}
    return mesh.coordinates, groups, sums, slices, (mesh.replica, mesh.replicas, mesh.terms), str(mesh)


@pytest.mark.parametrize("sizes", [dict(tensor=2, pipeline=2), dict(data=2, expert=2), dict(data=2, shard=2),
                                   dict(context=4), dict(data=1, pipeline=4)], ids=str)
def test_groups_are_the_ranks_that_differ_along_the_axes_only(sizes):
    answers = run(looked_at, 4, sizes)
    everywhere = [answer[0] for answer in answers]
    assert len({tuple(where.values()) for where in everywhere}) == 4
    # Neighbours differ along the last axis that has several ranks.
    last = [axis for axis in AXES if sizes.get(axis, 1) > 1][-1]
    assert [axis for axis in AXES if everywhere[0][axis] != everywhere[1][axis]] == [last]
    for rank, (mine, groups, sums, slices, (replica, replicas, terms), text) in enumerate(answers):
        for axes, members in groups.items():
            by_hand = [other for other, there in enumerate(everywhere)
                       if all(there[axis] == mine[axis] for axis in AXES if axis not in axes)]
            assert members == by_hand, (rank, axes)
            assert sums[axes] == sum(by_hand)
        assert all(slices[axis] == groups[axis,] for axis in AXES)
        assert replicas == math.prod(sizes.get(axis, 1) for axis in ("data", "shard", "expert"))
        assert 0 <= replica < replicas
        assert terms == math.prod(sizes.get(axis, 1) for axis in MEAN)
        named = " x ".join(f"{axis} {sizes[axis]}" for axis in AXES if sizes.get(axis, 1) > 1)
        assert text.splitlines()[0] == f"mesh of 4 ranks: {named}"


def sliced(wire):
    mesh = Mesh(shard=2, tensor=2)
    both, one = mesh["shard", "tensor"], mesh["data", "shard"]
    return (both.mesh_dim_names, both.size(), one.mesh_dim_names, mesh["data", "context"].size(),
            mesh["shard"]._get_root_mesh() is mesh["tensor"]._get_root_mesh(),
            mesh.wire("shard") is mesh.wire("data", "shard"), mesh.wire() is mesh.wire(*AXES),
            Mesh.of(init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))).sizes)


def test_slices_are_of_one_mesh_and_leave_axes_of_one_rank_out():
    both, size, one, nothing, same_root, same_wire, same_world, sizes = run(sliced, 4)[0]
    assert (both, size, one, nothing) == (("shard", "tensor"), 4, ("shard",), 1)
    assert same_root
    assert same_wire
    assert same_world
    assert sizes == {"pipeline": 1, "data": 2, "shard": 1, "expert": 1, "context": 1, "tensor": 2}


def refused(wire, sizes):
    with pytest.raises(ValueError, match=r"ranks|axis") as raised:
        Mesh(**(sizes if isinstance(sizes, dict) else sizes[wire.rank]))
    return str(raised.value)


@pytest.mark.parametrize("sizes, words", [
    (dict(tensor=3), "a mesh of tensor 3 has 3 ranks, and there are 2: start a multiple of that many"),
    (dict(data=2, pipeline=2), "a mesh of pipeline 2 x data 2 has 4 ranks, and there are 2: start as many"),
    (dict(data=1), "a mesh of data 1 has 1 ranks, and there are 2"),
    (dict(tensor=0), "tensor=0: an axis has 1 rank or more"),
    (dict(tensor=True), "tensor=True: an axis"),
    ([dict(tensor=2), dict(pipeline=2)], "the ranks make different meshes: rank 0 asks for"),
], ids=str)
def test_what_does_not_fit_the_world_is_refused_on_every_rank_with_one_text(sizes, words):
    first, second = run(refused, 2, sizes)
    assert first == second
    assert first.startswith(words)


def asked_wrongly(wire):
    mesh = Mesh(tensor=2)

    def torchs(*names):
        return Mesh.of(init_device_mesh("cpu", (1, 2), mesh_dim_names=names))

    for ask, words in (
            (lambda: mesh["tensor", "data"], "axes stand as tensor, data: give each once, in the order data, tensor"),
            (lambda: mesh["dp"], "'dp' is no axis of a mesh: there are pipeline, data"),
            (lambda: mesh.ranks("data", "data"), "axes stand as data, data"),
            (lambda: mesh.wire("tensor", "data"), "axes stand as tensor, data"),
            (lambda: mesh.wire("model"), "'model' is no axis"),
            (lambda: torchs("tensor", "pipeline"), "the dimensions of a mesh stand as tensor, pipeline"),
            (lambda: torchs("dp", "tensor"), "'dp' is no axis")):
        with pytest.raises(ValueError, match=words):
            ask()


def test_axes_in_another_order_are_refused():
    run(asked_wrongly, 2)


def test_a_mesh_needs_torch_distributed():
    with pytest.raises(RuntimeError, match="call init_process_group"):
        Mesh(tensor=2)


def test_data_takes_what_is_left():
    assert filled({"pipeline": 2, "data": None, "tensor": 4}, 32)["data"] == 4
