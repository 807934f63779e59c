"""Pipelines in use: losses with items, metrics, lengths that change, autocast, loss scale, stages of odd kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pipelines import BOUND, Alone, entropy, gpt, same, tokens
from ranks import run
from torch import Tensor, nn

from fasttrain.dist.mesh import Mesh
from fasttrain.optim import AdamW
from fasttrain.parallel.pipeline import Pipeline, split, ties
from fasttrain.precision.loss_scale import LossScaler


def mesh_of(wire: Any) -> Mesh:
    return Mesh(pipeline=wire.size, watch=False)


def close(actual: Any, expected: Any, bound: float = BOUND) -> None:
    torch.testing.assert_close(actual, expected, rtol=bound, atol=bound)


# --- Losses -----------------------------------------------------------------------------------------------------------

def sum_and_items(logits: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """Of tokens but those of the kind 0."""
    kept = targets != 0
    return F.cross_entropy(logits[kept], targets[kept], reduction="sum"), int(kept.sum())


def mean_of_items(logits: Tensor, targets: Tensor) -> Tensor:
    loss, items = sum_and_items(logits, targets)
    return loss / items


def hits(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.argmax(-1) == targets).sum()


def with_items(wire: Any) -> None:
    mesh, alone = mesh_of(wire), Alone(gpt(True), mean_of_items)
    stage = split(gpt(True), mesh, schedule="zbv")
    pipeline = Pipeline(stage, mesh, sum_and_items, micro_batches=4, metrics={"hits": hits})
    optimizer = AdamW(stage.parameters(), lr=0.01)
    for step in range(2):
        inputs, targets = tokens(8, step)
        right = hits(alone.model(inputs), targets)
        loss, norm, _ = alone.step(inputs, targets)
        close(pipeline.evaluate(inputs, targets).item(), loss)
        close(pipeline.step(inputs, targets).item(), loss)
        assert pipeline.sums.items == int((targets != 0).sum())
        close(pipeline.sums.loss.item(), loss * pipeline.sums.items)
        assert pipeline.sums.metrics == {"hits": right}
        close(pipeline.update(optimizer, max_norm=0.5).double(), norm, 1e-6)
        optimizer.zero_grad()
        same(stage, alone.model)


def scaled(wire: Any) -> None:
    """A loss scale changes nothing, and a bad step is skipped on every rank."""
    mesh, alone = mesh_of(wire), Alone(gpt())
    stage = split(gpt(), mesh, schedule="interleaved")
    scaler = LossScaler(2.0**10)
    pipeline = Pipeline(stage, mesh, entropy, micro_batches=2, scaler=scaler)
    optimizer = AdamW(stage.parameters(), lr=0.01)
    loss, norm, _ = alone.step(*tokens(4, 0))
    close(pipeline.step(*tokens(4, 0)).item(), loss)
    close(pipeline.update(optimizer, max_norm=0.5).double(), norm, 1e-6)
    optimizer.zero_grad()
    same(stage, alone.model)
    before = [p.detach().clone() for p in stage.parameters()]
    pipeline.step(*tokens(4, 1))
    if wire.rank == 0:
        next(stage.parameters()).grad.view(-1)[0] = float("inf")
    pipeline.update(optimizer, max_norm=0.5)
    assert all(torch.equal(p, q) for p, q in zip(stage.parameters(), before, strict=True))
    assert scaler.get_scale() == 2.0**9


def lengths(wire: Any) -> None:
    """Sequences and batches of other sizes from step to step, with evaluations between; the last batch fits too."""
    mesh, alone = mesh_of(wire), Alone(gpt())
    stage = split(gpt(), mesh)
    pipeline = Pipeline(stage, mesh, entropy, micro_batches=2)
    optimizer = AdamW(stage.parameters(), lr=0.01)
    for step, (samples, positions) in enumerate([(4, 5), (8, 3), (4, 5), (2, 4), (6, 2), (4, 1)]):
        batch = tokens(samples, step, positions)
        loss, _, _ = alone.step(*batch)
        close(pipeline.evaluate(*batch).item(), loss)
        close(pipeline.step(*batch).item(), loss)
        pipeline.update(optimizer, max_norm=0.5)
        optimizer.zero_grad()
    same(stage, alone.model)
    assert len(pipeline._built) <= 4


def cast(wire: Any) -> None:
    """Under autocast activations travel in 16 bits, and the numbers are those of one process under autocast."""
    mesh = mesh_of(wire)

    def context() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))

    whole, model = make(), split(make(), mesh)
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(4, 4, generator=generator), torch.randn(4, 4, generator=generator)
    pipeline = Pipeline(model, mesh, lambda y, t: (y.float() - t).square().mean(), micro_batches=2, context=context)
    sent = dict(pipeline.wire.bytes)
    found = pipeline.step(x, t)
    moved = {kind: pipeline.wire.bytes[kind] - sent.get(kind, 0) for kind in ("activations", "gradients")}
    expected = sum(((whole_of(whole, a, context).float() - b).square().mean() / 2)
                   for a, b in zip(x.split(2), t.split(2), strict=True))
    expected.backward()
    close(found.float(), expected.detach(), 1e-6)
    for name, p in model.named_parameters():
        close(p.grad, dict(whole.named_parameters())[name].grad, 1e-6)
    assert moved == {"activations": 2 * 2 * 4 * 2 * (wire.rank == 0), "gradients": 2 * 2 * 4 * 2 * (wire.rank == 1)}


def whole_of(model: nn.Module, x: Tensor, context: Any) -> Tensor:
    with context():
        return model(x)


@pytest.mark.parametrize("work", [with_items, scaled, lengths, cast])
def test_in_use(work: Any) -> None:
    run(work, 2)


# --- Stages of all kinds ----------------------------------------------------------------------------------------------

class Two(nn.Module):
    """Gives two tensors, one of them of integers, and takes what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, given: Any) -> Any:
        x, count = given if isinstance(given, tuple) else (given, torch.zeros(given.shape[0], dtype=torch.int64))
        return self.linear(x) * (1 + count[:, None]), count + 1


class First(nn.Module):
    def forward(self, given: Any) -> Tensor:
        return given[0]


class Turned(nn.Module):
    """A view, not contiguous, as output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mT).mT.mT


def normed() -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.0)).double() for _ in range(4)]


def frozen(first: int) -> list[nn.Module]:
    blocks = [nn.Linear(3, 3, dtype=torch.float64) for _ in range(4)]
    for block in blocks[:first]:
        block.requires_grad_(False)
    return list(blocks)


MODELS = {
    "tuples": lambda: [Two(), Two(), Two(), Two(), First()],
    "views": lambda: [Turned() for _ in range(4)],
    "expanded": lambda: [nn.Linear(3, 3, dtype=torch.float64) for _ in range(4)],
    "buffers": normed,
    "frozen first": lambda: frozen(1),
    "frozen stage": lambda: frozen(2),
}


def kinds(wire: Any, schedule: str) -> None:
    """One step of each kind of model, beside the same micro-batches in one process."""
    mesh = mesh_of(wire)
    for kind, make in MODELS.items():
        torch.manual_seed(0)
        whole, model = nn.Sequential(*make()), make()
        nn.Sequential(*model).load_state_dict(whole.state_dict())
        x = torch.randn(4, 3, 3, dtype=torch.float64) if kind == "views" else torch.randn(4, 3, dtype=torch.float64)
        loss = (lambda y, t: y.sum()) if kind == "expanded" else lambda y, t: y.square().sum()
        stage = split(model, mesh, schedule=schedule, costs=[1.0] * len(model))
        pipeline = Pipeline(stage, mesh, loss, micro_batches=2)
        expected = torch.zeros((), dtype=torch.float64)
        for part in x.split(2):
            value = loss(whole(part), None) / 2
            value.backward()
            expected += value.detach()
        state = torch.get_rng_state()
        close(pipeline.step(x), expected)
        assert torch.equal(torch.get_rng_state(), state), f"{kind}: the first step drew random numbers of its own"
        for name, p in stage.named_parameters():
            grad = dict(whole.named_parameters())[name].grad
            assert (p.grad is None) == (grad is None), f"{kind}: {name}"
            if grad is not None:
                close(p.grad, grad)
        for name, buffer in stage.named_buffers():
            close(buffer, dict(whole.named_buffers())[name])
        pipeline.close()


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero-bubble", "zbv"])
def test_stages_of_all_kinds(schedule: str) -> None:
    run(kinds, 2, schedule)


# --- What is tied -----------------------------------------------------------------------------------------------------

def ones(wire: Any) -> list[Any]:
    """All gradients one: the norm is the root of the number of parameters of the whole model."""
    mesh = mesh_of(wire)
    whole = gpt(True)
    stage = split(gpt(True), mesh, schedule="1f1b", costs=[1, 1, 1, 9, 1, 1, 9, 1, 1])
    pipeline = Pipeline(stage, mesh, entropy, micro_batches=4)
    optimizer = AdamW(stage.parameters(), lr=0.01)
    for p in stage.parameters():
        p.grad = torch.ones_like(p)
    squares, bad = pipeline.statistics(optimizer)
    assert squares.item() == sum(p.numel() for p in whole.parameters())
    assert not bad
    if wire.rank == wire.size - 1:
        stage.head.weight.grad[0, 0] = float("nan")
    assert pipeline.statistics(optimizer)[1]
    return list(ties(stage).items())


def test_what_is_tied_counts_once() -> None:
    found = run(ones, 4)
    assert found[0] == [("embedding.bytes.weight", (0, 3))]
    assert found[1] == found[2] == found[0]     # in one order for all, by the name in the whole model
    assert found[3] == [("head.weight", (0, 3))]


def made_equal(wire: Any) -> float:
    """Copies that were initialised apart become those of the first stage; a copy that stages differ in is found."""
    mesh = mesh_of(wire)
    stage = split(gpt(True), mesh)
    weight = stage.embedding.bytes.weight if wire.rank == 0 else stage.head.weight
    with torch.no_grad():
        weight.fill_(1.0 + wire.rank)
    Pipeline(stage, mesh, entropy, micro_batches=2)
    return weight.sum().item() / weight.numel()


def test_copies_begin_equal() -> None:
    assert run(made_equal, 2) == [1.0, 1.0]
