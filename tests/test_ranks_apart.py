"""Ranks that do not do the same in a step: the same error on all, in that step, and no parameter has moved."""

import contextlib

import pytest
import ranks
import torch
from torch import nn

from fasttrain.optim import SGD
from fasttrain.parallel import DataParallel, Disagreement
from fasttrain.parallel.wires import Same


class Swapped(Same):
    """Sends its second and third bucket in the other order."""

    def send(self, index, bucket):
        other = {1: 2, 2: 1}.get(index, index) if self.wire.rank else index
        return super().send(other, bucket)


def odd_step(model, optimizer, x, how, odd):
    """A step in which one rank does something else."""
    if how == "no_sync":
        with model.no_sync() if odd else contextlib.nullcontext():
            model(x).sum().backward()
    elif how == "twice":
        if odd:
            with model.no_sync():
                model(x).sum().backward()
        model(x).sum().backward()
    elif how == "no gradient":
        loss = model(x).sum()
        (loss.detach().requires_grad_() if odd else loss).backward()
    elif how == "no backward":
        loss = model(x).sum()
        if not odd:
            loss.backward()
    elif how == "all under no_sync":
        with model.no_sync():
            model(x).sum().backward()
    else:
        model(x).sum().backward()
    optimizer.step()


def apart(wire, how):
    torch.manual_seed(1)
    model = DataParallel(nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4))), mesh=wire,
                         bucket_cap_mb=0.0001, wire=Swapped() if how == "swapped" else "same")
    optimizer = SGD(model.parameters(), lr=0.1)
    x = torch.ones(2, 8)
    for _ in range(2):  # good steps
        if how != "swapped":
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises((Disagreement, RuntimeError)) as error:
        odd_step(model, optimizer, x, how, wire.rank == 1)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    return str(error.value)


@pytest.mark.parametrize(("how", "words"), [
    ("no_sync", "optimizer.step"), ("twice", "backward passes"), ("no gradient", "any gradient"),
    ("no backward", "any gradient"), ("all under no_sync", "accumulated under no_sync"), ("swapped", "checksum")])
def test_the_same_error_everywhere(how, words):
    texts = ranks.run(apart, 3, how)
    assert texts[0] == texts[1] == texts[2]
    assert words in texts[0]


def tokens(wire, micro_batches):
    """The mean over tokens of ranks and micro-batches of different sizes, clipped: as one large batch."""
    torch.manual_seed(2)
    model, whole = (nn.Linear(6, 5) for _ in range(2))
    whole.load_state_dict(model.state_dict())
    model = DataParallel(model, mesh=wire)
    mine, theirs = SGD(model.parameters(), lr=0.5), torch.optim.SGD(whole.parameters(), lr=0.5)
    noise = torch.Generator().manual_seed(0)
    data = [[torch.randn(1 + (3 * rank + micro) % 5, 6, generator=noise) for micro in range(micro_batches)]
            for rank in range(wire.size)]
    accumulate = model.accumulate(3)
    for number, x in enumerate(data[wire.rank]):
        with accumulate(final=number + 1 == micro_batches):
            loss = model(x).square().sum()
            model.count(len(x))
            loss.backward()
        if accumulate.ends:
            norm = model.step(mine, max_norm=0.5)
            mine.zero_grad()
            group = range(number + 1 - accumulate.taken, number + 1)
            together = torch.cat([data[rank][micro] for rank in range(wire.size) for micro in group])
            whole(together).square().sum().div(len(together)).backward()
            torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(whole.parameters(), 0.5))
            theirs.step()
            theirs.zero_grad()
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    if wire.rank == 0:
        model.count(4)  # another rank may count nothing
    model(torch.ones(1, 6)).sum().backward()
    total = model.grad_norm()
    torch.testing.assert_close(model.step(mine), total * wire.size / 4)
    mine.zero_grad()
    model(torch.ones(1, 6)).sum().backward()
    mine.step()  # a mean again
    model.count(3)
    model(torch.ones(1, 6)).sum().backward()
    with pytest.raises(RuntimeError, match="would not divide by them"):
        mine.step()
    with pytest.raises(TypeError, match="SGD cannot divide by a number of items"):
        model.step(theirs)
    if wire.size > 1:
        model.zero_grad()
        several_passes(model, mine, wire)


def several_passes(model, optimizer, wire):
    """Items of several synchronised passes add up, as their gradients do, and are forgotten with them."""
    for items in (3, 5):
        model.count(items)
        model(torch.ones(1, 6)).sum().backward()
    total = model.grad_norm()
    torch.testing.assert_close(model.step(optimizer), total / 8)
    optimizer.zero_grad()
    for items in (3, 5):
        optimizer.zero_grad()
        model.count(items)
        model(torch.ones(1, 6)).sum().backward()
    torch.testing.assert_close(model.step(optimizer), model.grad_norm() / 5)
    model.count(2)
    with pytest.raises(RuntimeError, match="2 items were counted after the backward pass that synchronised"):
        model.step(optimizer)


@pytest.mark.parametrize("size", [1, 3])
def test_mean_over_tokens(size):
    ranks.run(tokens, size, 5)
