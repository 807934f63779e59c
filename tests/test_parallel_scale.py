"""Loss scales over ranks: a gradient that is not finite on one of them skips the step on all, and is traced."""

import ranks
import torch
from torch import nn

from fasttrain import LossScaler
from fasttrain.optim import SGD
from fasttrain.parallel import DataParallel


def model_of(mesh, **options):
    torch.manual_seed(0)
    return DataParallel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), mesh=mesh, **options)


def backward(model, wire, scaler, bad=False):
    loss = model(torch.full((2, 4), 1.0 + wire.rank)).square().sum()
    scaler.scale(loss * float("inf") if bad else loss).backward()


def ours(wire, way):
    """NaN on one rank in the third and fourth step; our scaler, the reducer's own statistics."""
    model = model_of(wire, wire=way, bucket_cap_mb=0.0001)
    optimizer = SGD(model.parameters(), lr=0.01)
    scaler = LossScaler(init_scale=256.0, growth_interval=100)
    plain = model_of(wire, wire=way, bucket_cap_mb=0.0001)
    want = SGD(plain.parameters(), lr=0.01)
    for step in range(6):
        bad = wire.rank == 1 and step in (2, 3)
        backward(model, wire, scaler, bad)
        before = [p.detach().clone() for p in model.parameters()]
        norm = scaler.step(optimizer, max_norm=1.0, statistics=model.reducer.statistics())
        if step in (2, 3):
            assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
            assert len(model.reducer.nonfinite()) == 4
            assert model.reducer.culprits == ({} if step == 2 else {1: ["1.bias", "1.weight", "0.bias", "0.weight"]})
        else:
            loss = plain(torch.full((2, 4), 1.0 + wire.rank)).square().sum()
            loss.backward()
            torch.testing.assert_close(norm, want.clip_grad_norm_(1.0, norm=plain.grad_norm()), rtol=2e-2, atol=0)
            want.step()
            want.zero_grad()
        optimizer.zero_grad()
    assert scaler.get_scale() == 64.0
    bound = {"same": 1e-6, "ordered": 1e-6, "bf16": 2e-2, "int8": 3e-2}[way]
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=bound, atol=bound)
    return [p.tolist() for p in model.parameters()]


def torchs(wire):
    """torch's GradScaler, unscale_ and clip, as with DistributedDataParallel."""
    results = []
    for wrap in (lambda net: DataParallel(net, mesh=wire), nn.parallel.DistributedDataParallel):
        torch.manual_seed(0)
        model = wrap(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for step in range(4):
            backward(model, wire, scaler, bad=wire.rank == 0 and step == 1)
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append((scaler.get_scale(), [p.detach() for p in model.parameters()]))
    (mine, params), (theirs, other) = results
    assert mine == theirs == 128.0
    assert all(torch.allclose(p, q, rtol=1e-6) for p, q in zip(params, other, strict=True))


def test_ours():
    for way in ("same", "bf16", "int8"):
        answers = ranks.run(ours, 2, way)
        assert answers[0] == answers[1]


def test_torchs():
    ranks.run(torchs, 2)
