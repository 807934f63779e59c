"""Gradients of a pipeline's stages: each reduces its own, ties over their stages, and all know of all."""

import pytest
import torch
from ranks import run
from torch import nn

from fasttrain.dist.mesh import Mesh
from fasttrain.optim import SGD
from fasttrain.parallel import Reducer

CLOSE = dict(rtol=1e-10, atol=1e-12)  # float64, in another order of sums
CLIP = 0.01


class Net(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 8), nn.Linear(8, 7, bias=False)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        if tied:
            self.head.weight = self.embed.weight
        else:
            self.head.weight.data.copy_(self.embed.weight)

    def forward(self, x):
        h = self.embed(x)
        for block in self.blocks:
            h = h + block(h).tanh()
        return self.head(h)


def net(tied):
    torch.manual_seed(0)
    whole = Net(True).double()
    made = Net(tied).double()
    made.load_state_dict(whole.state_dict())
    return made


def loss_of(model, step, replica, micro):
    noise = torch.Generator().manual_seed(100 * step + 10 * replica + micro)
    x = torch.randint(0, 7, (3, 6), generator=noise)
    return nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten())


def held(model, stage, stages):
    """The parameters of a stage by name: the blocks in turn, the embedding on the first, the head on the last."""
    names = [f"blocks.{n}." for n in range(4) if n * stages // 4 == stage]
    names += ["embed."] * (stage == 0) + ["head."] * (stage == stages - 1)
    return [(name, p) for name, p in model.named_parameters() if name.startswith(tuple(names))]


def staged(wire, sizes, how, options):
    """Each rank computes the whole model and holds a stage of it: what other stages hold is nobody's here."""
    mesh = Mesh(**sizes)
    stages, stage = mesh.sizes["pipeline"], mesh.coordinates["pipeline"]
    whole, mine = net(True), net(False)
    named = held(mine, stage, stages)
    end = {0: "embed.weight", stages - 1: "head.weight"}.get(stage, "elsewhere")
    reducer = Reducer(named, mesh, tied={end: (0, stages - 1)}, bucket_bytes=600, first_bucket_bytes=600, **options)
    optimizer, reference = SGD([p for _, p in named], lr=1.0), torch.optim.SGD(whole.parameters(), lr=1.0)
    outcomes = []
    for step in range(3):
        for micro in range(2):
            for replica in range(mesh.replicas):
                (loss_of(whole, step, replica, micro) / mesh.replicas).backward()
        before = [sum(wire.calls.values()) for wire in reducer.reach.everyone]
        total = torch.zeros(())
        for micro in range(2):
            context = reducer.no_sync() if how == "hooks" and micro == 0 else reducer.paused()
            if how == "hooks" and micro == 1:
                context = torch.enable_grad()
            with context:
                loss = loss_of(mine, step, mesh.replica, micro)
                total = total + loss.detach()
                reducer.count(5 + mesh.replica)  # on every stage: the last one's counts
                reducer.loss = total if mesh.last_stage else 100.0
                loss.backward()
        if how == "told":
            reducer.reduce([p for _, p in named][1:])
            with pytest.raises(RuntimeError, match="twice"):
                reducer.reduce([named[-1][1]])
            reducer.reduce()
            reducer.finish()
        calls = [sum(wire.calls.values()) - had for wire, had in zip(reducer.reach.everyone, before, strict=True)]
        own = [plan for plan in reducer.layout.buckets if plan.world > 1]
        assert sum(calls) == len(own) + 2, calls  # of the stage's ranks, and along the pipeline
        theirs = dict(whole.named_parameters())
        for name, p in named:
            torch.testing.assert_close(p.grad, theirs.get(name, whole.embed.weight).grad, **CLOSE)
        want = sum(p.grad.square().sum() for p in whole.parameters())
        torch.testing.assert_close(reducer.statistics()[0], want, **CLOSE)
        items = 2 * sum(5 + replica for replica in range(mesh.replicas))
        for p in whole.parameters():
            p.grad.mul_(mesh.replicas / items)
        norm = nn.utils.clip_grad_norm_(whole.parameters(), CLIP)
        torch.testing.assert_close(reducer.step(optimizer, CLIP), norm.float())
        reference.step()
        whole.zero_grad()
        mine.zero_grad()
        for name, p in named:
            torch.testing.assert_close(p, theirs.get(name, whole.embed.weight), rtol=1e-6, atol=0)  # clipped in float32
        mine.load_state_dict(whole.state_dict())  # what the other stages have stepped
        assert reducer.last.tokens == items
        outcomes.append(reducer.last._replace(used=[]))
    return outcomes


@pytest.mark.parametrize(("size", "sizes", "how", "options"), [
    (2, dict(pipeline=2), "told", {}),
    (4, dict(pipeline=2, data=2), "hooks", {}),
    (4, dict(pipeline=2, data=2), "told", {"wire": "ordered"}),
    (3, dict(pipeline=3), "told", {}),
    pytest.param(8, dict(pipeline=4, data=2), "told", {}, marks=pytest.mark.slow),
], ids=str)
def test_stages(size, sizes, how, options):
    answers = run(staged, size, sizes, how, options)
    assert len({str(outcomes) for outcomes in answers}) == 1
