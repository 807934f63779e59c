"""Communication begins while backward runs, and what a step costs beside it is counted."""

import copy
import shutil
import warnings

import pytest
import ranks
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fasttrain.parallel import DataParallel
from fasttrain.parallel.wires import Same


class Counted(Same):
    """Notes how many gradients had arrived when each bucket was sent."""

    def send(self, index, bucket):
        self.arrived.append(len(self.reducer._arrivals))
        return super().send(index, bucket)


def net():
    torch.manual_seed(1)
    return nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(8)))


def first_sent(wire, backend):
    method = Counted()
    method.arrived = []
    blocks = net()
    model = DataParallel(blocks, mesh=wire, wire=method, bucket_cap_mb=0.01)
    method.reducer = model.reducer
    if backend is not None:
        for block in blocks:
            block.compile(backend=backend)
    model.reducer.record_timeline()
    for _ in range(2):
        method.arrived.clear()
        model(torch.randn(4, 32)).sum().backward()
    timeline = model.reducer.timeline
    assert timeline.buckets[0].sent < timeline.backward
    assert all(moments.received >= moments.sent for moments in timeline.buckets)
    assert "exposed communication" in timeline.draw()
    names = model.reducer.recorded_order()
    assert sorted(names) == sorted(model.reducer.names)
    assert names[0] == "7.0.bias"
    return method.arrived, len(model.reducer.params)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_the_first_bucket_leaves_before_half_of_backward(backend):
    for arrived, gradients in ranks.run(first_sent, 2, backend):
        assert arrived[0] < gradients / 2
        assert arrived == sorted(arrived)
        assert len(arrived) >= 4


def one_graph(wire, backend="aot_eager"):
    model = DataParallel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), mesh=wire)
    plain = copy.deepcopy(model.module)
    model.module.compile(backend=backend)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(5):
            model(torch.ones(2, 4)).sum().backward()
    said = [str(warning.message) for warning in told if "one compiled graph" in str(warning.message)]
    assert len(said) == 1
    assert "ms of communication were not hidden" in said[0]
    assert model.reducer.timeline is None
    for _ in range(5):
        plain(torch.ones(2, 4)).sum().backward()
    for p, q in zip(model.module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_whole_graph_is_told_once():
    ranks.run(one_graph, 2)


def with_inductor(wire, cache):
    """Block by block, and the whole model as one graph."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", cache)
        patch.setattr("torch._inductor.config.compile_threads", 1)  # no pool of processes
        found = first_sent(wire, "inductor")
        one_graph(wire, "inductor")
    return found


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler")
def test_inductor(tmp_path):
    for arrived, gradients in ranks.run(with_inductor, 2, str(tmp_path)):
        assert arrived[0] < gradients / 2


def equals_ddp(wire):
    """With stock torch around it: gradients, clipping and momentum SGD over steps, as DistributedDataParallel."""
    models = []
    for make in (lambda net: DataParallel(net, mesh=wire), DistributedDataParallel):
        torch.manual_seed(0)
        net = make(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 5))
                   .to(memory_format=torch.channels_last))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, foreach=True)
        noise = torch.Generator().manual_seed(wire.rank)
        for _ in range(4):
            x = torch.randn(6, 3, 8, 8, generator=noise).to(memory_format=torch.channels_last)
            nn.functional.cross_entropy(net(x), torch.arange(6) % 5).backward()
            norm = nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        models.append((net.module.state_dict(), norm))
    (mine, norm), (theirs, their_norm) = models
    torch.testing.assert_close(norm, their_norm, rtol=1e-5, atol=0)
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6, msg=name)


def test_as_ddp_with_stock_torch():
    ranks.run(equals_ddp, 2)
