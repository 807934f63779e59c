"""The life of a gradient in its bucket: what users and autograd do to `p.grad` between."""

import copy
import pickle

import pytest
import ranks
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fasttrain.optim import AdamW
from fasttrain.parallel import DataParallel, Reducer


def linear(wire, **options):
    torch.manual_seed(3)
    return DataParallel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), mesh=wire, **options)


def backward(model, wire, scale=1.0):
    (model(torch.full((2, 4), 1.0 + wire.rank)).sum() * scale).backward()


def grads(model):
    return [p.grad.clone() for p in model.parameters()]


def accumulates(wire):
    """Several synchronised backward passes, zeroed or replaced gradients: as one process adds them up."""
    model = linear(wire)
    backward(model, wire)
    once = grads(model)
    backward(model, wire)
    for one, p in zip(once, model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, 2 * one)
    model.zero_grad(set_to_none=False)
    assert all(p.grad.count_nonzero() == 0 for p in model.parameters())
    backward(model, wire)
    assert all(torch.equal(p.grad, one) for p, one in zip(model.parameters(), once, strict=True))
    for p in model.parameters():
        p.grad = torch.ones_like(p)  # a tensor of the user's
    backward(model, wire)
    for p, one in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, one + 1)
    for p in model.parameters():
        p.grad = None
    backward(model, wire)
    assert all(torch.equal(p.grad, one) for p, one in zip(model.parameters(), once, strict=True))
    return [g.tolist() for g in once]


def bytes_touched(wire):
    """One pack for each gradient, whatever zeroes and accumulates."""
    model = linear(wire)
    counted = []
    for none in (True, True, False, False):
        before = sum(bucket.touched for bucket in model.reducer.buckets)
        backward(model, wire)
        counted.append(sum(bucket.touched for bucket in model.reducer.buckets) - before)
        model.zero_grad(set_to_none=none)
    return counted, 8 * sum(p.numel() for p in model.parameters())


def rests(wire):
    """A parameter that no rank used keeps None; AdamW leaves it alone."""
    model = linear(wire)
    model.module.add_module("aside", nn.Linear(4, 2))
    model = DataParallel(copy.deepcopy(model.module), mesh=wire)
    first = model.module[0].weight
    optimizer = AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    loss = nn.functional.linear(torch.ones(1, 4), first).sum() if wire.rank else 0 * model.module[1].bias.sum()
    before = [p.detach().clone() for p in model.parameters()]
    loss.backward()
    used = [p.grad is not None for p in model.parameters()]
    optimizer.step()
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    return used, moved


def checkpointed(wire):
    """A parameter in two re-entrant checkpoints: an error, or right with a static graph; nested passes end once."""
    torch.manual_seed(5)
    layer, first = nn.Linear(4, 4), nn.Linear(4, 4)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.first = copy.deepcopy(layer), copy.deepcopy(first)

        def forward(self, x):
            x = self.first(x)
            for _ in range(2):
                x = checkpoint(self.layer, x, use_reentrant=True)
            return x

    plain = Twice()
    total = sum(plain(torch.full((2, 4), 1.0 + rank)).sum() for rank in range(wire.size)) / wire.size
    total.backward()
    static = DataParallel(Twice(), mesh=wire, static_graph=True)
    for _ in range(3):
        static.zero_grad()
        backward(static, wire)
        for p, q in zip(static.module.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    with pytest.raises(RuntimeError, match=r"layer.* arrived twice in one backward pass.*static_graph=True"):
        backward(DataParallel(Twice(), mesh=wire), wire)


def recomputed(wire):
    """Non-re-entrant checkpoints: of a parameter that is used in two of them, nested ones, and under no_sync."""
    torch.manual_seed(5)
    layer, first = nn.Linear(4, 4), nn.Linear(4, 4)

    class Twice(nn.Module):
        def __init__(self, checkpointed):
            super().__init__()
            self.layer, self.first, self.checkpointed = copy.deepcopy(layer), copy.deepcopy(first), checkpointed

        def inner(self, x):
            return self.again(lambda y: self.layer(y).tanh(), x)

        def again(self, part, x):
            return checkpoint(part, x, use_reentrant=False) if self.checkpointed else part(x)

        def forward(self, x):
            for _ in range(2):
                x = self.again(lambda y: self.inner(self.first(y)), x)
            return x

    found = []
    for checkpointed in (True, False):
        model = DataParallel(Twice(checkpointed), mesh=wire, bucket_cap_mb=0.0001)
        with model.no_sync():
            backward(model, wire)
        backward(model, wire, 0.5)
        found.append(grads(model))
        assert model.reducer.sequence == 1
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def hooks(wire):
    """Comm hooks with torch's signature."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    model = linear(wire)
    backward(model, wire)
    want = grads(model)
    def elsewhere(state, bucket):
        """The mean in memory of its own."""
        mean = bucket.buffer().clone()
        torch.distributed.all_reduce(mean)
        future = torch.futures.Future()
        future.set_result(mean / wire.size)
        return future

    found = {}
    powered = powerSGD_hook.PowerSGDState(None, 2, start_powerSGD_iter=2)
    for name, state, hook in (("all_reduce", None, default_hooks.allreduce_hook),
                              ("elsewhere", None, elsewhere), ("fp16", None, default_hooks.fp16_compress_hook),
                              ("power", powered, powerSGD_hook.powerSGD_hook)):
        model.register_comm_hook(state, hook)
        for _ in range(4):
            model.zero_grad()
            backward(model, wire)
        found[name] = max(((g - w).norm() / w.norm()).item() for g, w in zip(grads(model), want, strict=True))
    model.register_comm_hook(None, lambda state, bucket: bucket.buffer())
    model.zero_grad()
    with pytest.raises(TypeError, match=r"must be a torch\.futures\.Future"):
        backward(model, wire)
    return found


def copies(wire):
    """Pickled, deep-copied; state dicts have the bare names; attributes reach the module."""
    model = linear(wire, bucket_cap_mb=0.001)
    model.module.answer = 42
    assert model.answer == 42
    with pytest.raises(AttributeError, match="nothing"):
        model.nothing  # noqa: B018
    state = model.state_dict()
    assert set(state) == set(model.module.state_dict())
    model.load_state_dict({f"module.{name}": value + 1 for name, value in state.items()})
    model.load_state_dict(state)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        model.zero_grad()
        backward(model, wire)
        backward(copied, wire)
        assert all(torch.equal(a, b) for a, b in zip(grads(model), grads(copied), strict=True))
        assert copied.reducer.layout.digest() == model.reducer.layout.digest()
        copied.reducer.remove()


def closures(wire):
    """Backward within the step, as LBFGS has it, several times; gradients of the step before are still there."""
    models = []
    for wrap in (lambda net: DataParallel(net, mesh=wire), nn.parallel.DistributedDataParallel):
        torch.manual_seed(3)
        model = wrap(nn.Linear(4, 2))
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(torch.full((2, 4), 1.0 + wire.rank)).square().sum()
            loss.backward()
            return loss.detach()

        for _ in range(3):
            optimizer.step(closure)
        models.append([p.detach() for p in model.parameters()])
    for mine, theirs in zip(*models, strict=True):
        torch.testing.assert_close(mine, theirs)


def refused(wire):
    model = linear(wire)
    with pytest.raises(ValueError, match=r"0\.weight is reduced already, by another wrapper"):
        Reducer(model.module.named_parameters(), wire)
    with pytest.raises(ValueError, match="wire='fp4': gradients travel as same, ordered, bf16, int8"):
        Reducer([nn.Parameter(torch.ones(2))], wire, wire="fp4")
    with pytest.raises(TypeError, match=r"wire='int8' cannot carry torch\.float64"):
        Reducer([nn.Parameter(torch.ones(2, dtype=torch.float64))], wire, wire="int8")
    with pytest.raises(ValueError, match="a process trains on one device"):
        Reducer([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))], wire)
    with pytest.raises(TypeError, match=r"parameter 0 is torch.complex64"):
        Reducer([nn.Parameter(torch.ones(2, dtype=torch.complex64))], wire)
    model.module[0].weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"0\.weight was frozen after it was wrapped"):
        backward(model, wire)


def test_accumulation():
    answers = ranks.run(accumulates, 2)
    assert answers[0] == answers[1]


def test_bytes():
    counted, one_pack = ranks.run(bytes_touched, 2)[0]
    assert all(count == one_pack for count in counted), (counted, one_pack)


def test_parameters_at_rest():
    (used, moved), (used_1, moved_1) = ranks.run(rests, 2)
    assert used == used_1 == moved == moved_1 == [True, False, False, True, False, False]


def test_checkpoints():
    ranks.run(checkpointed, 2)


def test_checkpoints_that_are_not_re_entrant():
    ranks.run(recomputed, 2)


def test_comm_hooks():
    found = ranks.run(hooks, 2)[0]
    assert found["all_reduce"] < 1e-6
    assert found["elsewhere"] < 1e-6
    assert found["fp16"] < 1e-3
    assert found["power"] < 0.3


def test_copies():
    ranks.run(copies, 2)


def test_closures():
    ranks.run(closures, 2)


def test_refused():
    ranks.run(refused, 2)
