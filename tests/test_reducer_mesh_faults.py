"""Ranks of a mesh that are not alike, do not do the same, or end: one text on all that compare, and no hang."""

import os
import signal
import time

import pytest
import ranks
import torch
from test_reducer_groups import Kinds, ones, parallel_of
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from fasttrain.dist.control import Disagreement
from fasttrain.dist.fingerprint import DisagreementError
from fasttrain.dist.mesh import Mesh
from fasttrain.parallel import Reducer

SIZES = dict(pipeline=2, tensor=2)  # of four ranks: 0 and 1 are the first stage


def comes_apart(wire, how):
    parallel = parallel_of(Mesh(**SIZES))
    reducer = parallel.reducer
    ones(parallel)
    parallel.zero_grad()
    if how == "a pass":  # rank 1 skips a backward pass
        with pytest.raises(Disagreement) as caught:
            reducer.finish() if wire.rank == 1 else ones(parallel)
    else:  # the second stage believes to be a step ahead
        reducer.sequence += wire.rank > 1
        with pytest.raises(Disagreement) as caught:
            ones(parallel)
    return str(caught.value)


@pytest.mark.parametrize(("how", "words"), [
    ("a pass", "the number of backward passes in it is 1 on rank 0 and 0 on rank 1; "),
    ("a step", "the ranks have come apart: the step is 1 on rank 0 and 2 on rank 2"),
])
def test_all_stages_learn_of_a_disagreement(how, words):
    answers = ranks.run(comes_apart, 4, how)
    assert words in answers[0]
    alike = answers if how == "a pass" else answers[::2]  # along each pipeline, the same
    assert set(alike) == {answers[0]}
    assert answers[1] == answers[0].replace("rank 0", "rank 1").replace("rank 2", "rank 3") or how == "a pass"


def built(wire, how):
    mesh = Mesh(**SIZES)
    module, tied = Kinds(mesh), {"ends": (0, 1)}
    if how == "undeclared" and wire.rank == 3:
        module.bias = nn.Parameter(module.bias.detach())
    if how == "placed" and wire.rank == 0:
        module.copied = nn.Parameter(DTensor.from_local(torch.zeros(6), mesh["tensor"], [Shard(0)], run_check=False,
                                                        shape=torch.Size([11]), stride=(1,)))
    if how == "not held" and wire.rank < 2:
        del module.ends
    if how == "tie of another shape" and wire.rank < 2:
        module.ends = module._cut(mesh["tensor"], (8, 6), [Shard(0)], torch.float32)
    wire = "ordered" if how == "options" and wire.rank < 2 else "same"
    with pytest.raises(DisagreementError) as caught:
        Reducer(module.named_parameters(), mesh, tied=tied, wire=wire)
    return str(caught.value)


@pytest.mark.parametrize(("how", "words", "who"), [
    ("undeclared", "group: 'data copied over tensor' on rank 3", [0, 1, 2, 3]),
    ("placed", "options.placements.copied[0]: ", [0, 1, 2, 3]),
    ("not held", "options.held as said: ", [0, 2]),
    ("tie of another shape", "shape: [8, 5]", [0, 2]),
    ("options", "options.wire", [0, 2]),
])
def test_what_was_not_built_alike_is_told_before_any_gradient_travels(how, words, who):
    """`who` compares with each other; where a pipeline does, each place in its stages for itself."""
    answers = ranks.run(built, 4, how)
    assert len({answers[rank] for rank in who}) == 1
    assert all(words in answer for answer in answers), answers[0]


def killed(wire, watcher, how):
    parallel = parallel_of(Mesh(**SIZES, watch=watcher))
    for step in range(3):
        if step == 1 and wire.rank == 3:
            ranks.mark("struck")
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("the batch is bad")
        ones(parallel)
        parallel.zero_grad()
    time.sleep(30)


@pytest.mark.parametrize(("how", "words"), [("killed", "rank 3"), ("raised", "the batch is bad")])
def test_all_axes_end_with_the_cause(how, words):
    ended = ranks.faulty(killed, 4, how)
    struck = ranks.times("struck", ended)[0]
    for rank in range(3):
        assert ended[rank].code not in (0, None), ended[rank]
        assert words in ended[rank].text, ended[rank]
        assert "rank 3" in ended[rank].text
    assert max(one.at for one in ended) - struck < 25  # the wires' own limit is 30 s
