"""Data x tensor x sequence x pipeline with tied ends in one reducer, by a schedule, beside one process."""

import pytest
import torch
from pipelines import BOUND, Alone, entropy
from ranks import run
from test_tensor_gpt import gpt

from fasttrain.dist.mesh import Mesh
from fasttrain.optim import AdamW
from fasttrain.optim.local import is_dtensor
from fasttrain.parallel import DataParallel
from fasttrain.parallel.pipeline import Pipeline, split, ties
from fasttrain.parallel.tensor import tensor_parallel

MODEL = dict(layers=6, width=16, heads=8, positions=6, vocabulary=12)


def model(tied):
    torch.manual_seed(2)
    return gpt(torch.float64, **MODEL, tied=tied)


def steps(wire, sizes, schedule, tied, sequence):
    mesh, micros = Mesh(**sizes), 4
    alone = Alone(model(tied))
    stage = split(tensor_parallel(model(tied), mesh, sequence=sequence, loss="whole"), mesh, schedule=schedule)
    parallel = DataParallel(stage, mesh=mesh, tied=ties(stage), bucket_cap_mb=0.002)
    pipeline = Pipeline(parallel, mesh, entropy, micro_batches=micros)
    optimizer, reducer = AdamW(stage.parameters(), lr=0.01), parallel.reducer
    told = []
    for step in range(3):
        found = torch.randint(12, (2 * micros * mesh.replicas, 7), generator=torch.Generator().manual_seed(step))
        mine = found.chunk(mesh.replicas)[mesh.replica]
        with torch.no_grad():
            loss = entropy(alone.model(mine[:, :-1]), mine[:, 1:]).item()
        _, norm, grads = alone.step(found[:, :-1], found[:, 1:])
        before = sum(sum(wire.calls.values()) for wire in reducer.reach.everyone)
        value = pipeline.step(mine[:, :-1], mine[:, 1:])
        calls = sum(sum(wire.calls.values()) for wire in reducer.reach.everyone) - before
        assert calls == sum(plan.world > 1 for plan in reducer.layout.buckets) + 2
        for name, p in stage.named_parameters(remove_duplicate=False):
            whole = p.grad.full_tensor() if is_dtensor(p) else p.grad
            torch.testing.assert_close(whole, grads[name], rtol=BOUND, atol=BOUND)
        torch.testing.assert_close(reducer.statistics()[0].sqrt(), norm, rtol=1e-10, atol=0)
        pipeline.update(optimizer, max_norm=0.5)
        optimizer.zero_grad()
        told.append((value.item(), loss))
    return told


@pytest.mark.parametrize(("sizes", "schedule", "tied", "sequence"), [
    (dict(pipeline=2, data=2, tensor=2), "1f1b", True, True),
    pytest.param(dict(pipeline=2, data=2, tensor=2), "zero-bubble", False, True, marks=pytest.mark.slow),
    pytest.param(dict(pipeline=2, data=2, tensor=2), "interleaved", True, False, marks=pytest.mark.slow),
    pytest.param(dict(pipeline=4, tensor=2), "zbv", True, True, marks=pytest.mark.slow),
    pytest.param(dict(pipeline=4, data=2), "gpipe", True, False, marks=pytest.mark.slow),
], ids=str)
def test_composed(sizes, schedule, tied, sequence):
    for told in run(steps, 8, sizes, schedule, tied, sequence):
        assert all(value == pytest.approx(loss, rel=1e-10) for value, loss in told), told
