"""Dropout by place: the same masks for any mesh, micro-batches and recomputation, against one element at a time."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import ranks
import torch
from helpers import assert_same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fasttrain.parallel.building.rules import key_of
from fasttrain.parallel.dropout import MASKS, Cut, Draws, Dropout, mask, seed_dropout
from fasttrain.precision.draws import WORD, random_bits, random_words

pytestmark = pytest.mark.usefixtures("one_thread")
B, T, C = 4, 8, 12


def naive(seed: int, step: int, name: str, shape: tuple[int, ...], p: float) -> Tensor:
    """Whether each element of the whole activation is kept, one after the other."""
    key, kept = key_of(seed, name, step, MASKS), torch.empty(shape, dtype=torch.bool)
    for index in range(kept.numel()):
        kept.view(-1)[index] = int(random_bits(key, torch.tensor(index))) >= round(p * 2**32)
    return kept


def one(p: float = 0.3, cuts: Any = (), name: str = "drop") -> tuple[Dropout, Draws]:
    model = nn.ModuleDict({name: nn.Dropout(p)})
    draws = seed_dropout(model, 5, {name: cuts})
    return model[name], draws


def kept_by(drop: Dropout, draws: Draws, shape: tuple[int, ...], step: int = 2, sample: int = 0) -> Tensor:
    draws.at(step, sample)
    return drop(torch.ones(shape)) != 0


WHOLE = naive(5, 2, "drop", (B, T, C), 0.3)


def test_one_process() -> None:
    drop, draws = one()
    assert torch.equal(kept_by(drop, draws, (B, T, C)), WHOLE)
    assert not torch.equal(kept_by(drop, draws, (B, T, C), step=3), WHOLE)
    assert torch.equal(kept_by(drop, draws, (B * T * C,)), WHOLE.flatten())
    other, draws = one(name="other")
    assert not torch.equal(kept_by(other, draws, (B, T, C)), WHOLE)


def test_words_are_bits() -> None:
    places = torch.cat([torch.arange(999), torch.arange(999) + (1 << 32) - 500, torch.arange(999) * (1 << 33) + 7])
    for key in (0, 1 << 40, 0xDEADBEEFCAFEBABE, (1 << 64) - 1):
        for some in (places, places[:999]):
            assert torch.equal(random_words(key, some).long() & WORD, random_bits(key, some))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_shares_and_values(p: float) -> None:
    """As many as p says within five standard errors; no two neighbours go together."""
    drop, draws = one(p)
    draws.at(0)
    x = torch.randn(64, 4096, requires_grad=True)
    y = drop(x)
    kept = y.detach() != 0
    n = kept.numel()
    assert abs(float(kept.double().mean()) - (1 - p)) <= 5 * math.sqrt(p * (1 - p) / n)
    z = (kept.double() - (1 - p)).flatten() / math.sqrt(p * (1 - p))
    for apart in (1, 2, 4096):
        assert abs(float((z[apart:] * z[:-apart]).mean())) <= 5 / math.sqrt(n)
    wanted = torch.where(kept, x.detach() * (1 / (1 - p)), 0.0)
    torch.testing.assert_close(y.detach(), wanted, rtol=1e-6, atol=0)
    y.backward(torch.full_like(y, 3.0))
    torch.testing.assert_close(x.grad, torch.where(kept, 3 / (1 - p), 0.0))


def test_nothing_and_everything() -> None:
    drop, draws = one(0.0)
    x = torch.randn(3, 4)
    assert drop(x) is x
    drop, draws = one(1.0)
    draws.at(0)
    assert_same_bits(drop(x).abs(), torch.zeros(3, 4))
    drop, draws = one(0.5)
    assert drop.eval()(x) is x
    draws.at(0)
    assert drop.train()(torch.ones(0, 4)).shape == (0, 4)
    draws.at(0)
    assert drop(x.bfloat16()).dtype == torch.bfloat16


# --- Parts ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("dim", [1, 2, -1])
def test_cut_dimensions(dim: int, parts: int) -> None:
    """Features between a column- and a row-parallel layer, positions under sequence parallel."""
    for part, wanted in enumerate(WHOLE.chunk(parts, dim)):
        drop, draws = one(cuts=[Cut(dim, part, parts)])
        assert torch.equal(kept_by(drop, draws, tuple(wanted.shape)), wanted)


def test_uneven_cuts() -> None:
    """By the rule of torch.chunk: 8 positions are 3, 3 and 2, and 12 features over five ranks 3, 3, 3, 3 and none."""
    cuts = [(1, part, 3, wanted) for part, wanted in enumerate(WHOLE.split(3, 1))]
    cuts += [(2, part, 5, wanted) for part, wanted in enumerate([*WHOLE.split(3, 2), WHOLE[..., :0]])]
    for dim, part, parts, wanted in cuts:
        drop, draws = one(cuts=[Cut(dim, part, parts, whole=WHOLE.shape[dim])])
        assert torch.equal(kept_by(drop, draws, tuple(wanted.shape)), wanted)


def test_samples() -> None:
    """Of data-parallel ranks, micro-batches and both: by the number of the first."""
    drop, draws = one()
    for size in (1, 2):
        for first in range(0, B, size):
            found = kept_by(drop, draws, (size, T, C), sample=first)
            assert torch.equal(found, WHOLE[first:first + size])


def test_several_axes() -> None:
    """Positions over context, in chunks that mirror each other, then over tensor; features too; samples over data."""
    order = [torch.tensor([0, 1, 6, 7]), torch.tensor([2, 3, 4, 5])]
    for context in range(2):
        for tensor in range(2):
            cuts = [Cut(1, parts=2, places=lambda size, context=context: order[context] * size // T),
                    Cut(1, tensor, 2), Cut(-1, tensor, 2)]
            drop, draws = one(cuts=cuts)
            rows = order[context].chunk(2)[tensor]
            wanted = WHOLE[2:4][:, rows][..., C // 2 * tensor:C // 2 * (tensor + 1)]
            assert torch.equal(kept_by(drop, draws, (2, 2, C // 2), sample=2), wanted)


def test_chunks_are_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from fasttrain.parallel import dropout

    held, sizes = [torch.arange(B), torch.arange(T), torch.arange(C)], [B, T, C]
    for at_once in (1, 30, 1 << 20):
        monkeypatch.setattr(dropout, "AT_ONCE", {"cpu": at_once})
        found = mask(key_of(5, "drop", 2, MASKS), held, sizes, 0.3, torch.device("cpu"))
        assert torch.equal(found, WHOLE)


def placed(wire: Any) -> list[Tensor]:
    """DTensors tell where they lie, with and without a context cut around them; gradients are placed alike."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, found = init_device_mesh("cpu", (wire.size,)), []
    for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
        drop, draws = one()
        draws.at(2)
        x = distribute_tensor(torch.ones(B, T, C), mesh, [placement]).requires_grad_()
        y = drop(x)
        y.sum().backward()
        assert y.placements == x.grad.placements == (placement,)
        found += [y.full_tensor() != 0, x.grad.full_tensor() != 0]
    drop, draws = one(cuts=[Cut(1, 1, 2)])
    draws.at(2)
    found.append(drop(distribute_tensor(torch.ones(B, T // 2, C), mesh, [Shard(1)])).full_tensor() != 0)
    return found


def test_dtensors() -> None:
    for *found, half in ranks.run(placed, 2):
        assert all(torch.equal(each, WHOLE) for each in found)
        assert torch.equal(half, WHOLE[:, T // 2:])


class Feed(nn.Module):
    """What a plan divides, with dropout inside of it and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up, self.inner = nn.Linear(16, 32), nn.Dropout(0.5)
        self.down, self.outer = nn.Linear(32, 16), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.down(self.inner(torch.relu(self.up(self.norm(x))))))


def divided(wire: Any, sequence: bool) -> tuple[Tensor, Tensor]:
    """(the loss, the gradient of the first weight) of two ranks of the tensor axis."""
    from fasttrain.parallel import Mesh
    from fasttrain.parallel.tensor import tensor_parallel

    mesh = Mesh(tensor=2, watch=False)
    model, x = made()
    cuts = {"*inner": [Cut.over(mesh, "tensor", -1)], "*outer": [Cut.over(mesh, "tensor", 1)] if sequence else []}
    draws = seed_dropout(model, 3, cuts)
    plan = {"0.up": "column", "0.down": "row", **({"0.norm": "sequence"} if sequence else {})}
    tensor_parallel(model, mesh, plan, sequence=sequence)
    draws.at(1)
    y = model(x.chunk(2, 1)[wire.rank] if sequence else x)
    loss = y.square().sum()
    loss.backward()
    total = wire.sum_(loss.detach().clone()) if sequence else loss.detach()
    return total, model[0].up.weight.grad.full_tensor()


def made() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(Feed()).double(), torch.randn(B, T, 16, dtype=torch.float64)


@pytest.mark.parametrize("sequence", [False, True])
def test_tensor_parallel(sequence: bool) -> None:
    model, x = made()
    seed_dropout(model, 3).at(1)
    loss = model(x).square().sum()
    loss.backward()
    for found, grad in ranks.run(divided, 2, sequence):
        torch.testing.assert_close(found, loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(grad, model[0].up.weight.grad, rtol=1e-10, atol=1e-12)


def piped(wire: Any, schedule: str) -> dict[str, Tensor]:
    """The loss and all gradients of this rank's stages, of a batch in four micro-batches."""
    from fasttrain.parallel import Mesh, pipeline

    mesh = Mesh(pipeline=2, watch=False)
    model, x = chain()
    draws = seed_dropout(model, 3)
    stage = pipeline.split(model, mesh, schedule=schedule)
    run = pipeline.Pipeline(stage, mesh, nn.functional.mse_loss, micro_batches=4, draws=draws)
    draws.at(1, sample=8)
    found = {"loss": run.step(x, x)}
    return {**found, **{name: p.grad for name, p in stage.named_parameters()}}


def chain() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(6, 6), nn.Dropout(0.5))]
    return nn.Sequential(*layers).double(), torch.randn(8, 6, dtype=torch.float64)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_pipelines(schedule: str) -> None:
    """Whatever the order of micro-batches, each draws as its part of the batch."""
    model, x = chain()
    seed_dropout(model, 3).at(1, sample=8)
    loss = nn.functional.mse_loss(model(x), x)
    loss.backward()
    wanted = {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}
    answers = ranks.run(piped, 2, schedule)
    assert {name for found in answers for name in found} == set(wanted)
    for found in answers:
        for name, value in found.items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-10, atol=1e-12, msg=name)


# --- Recomputing ------------------------------------------------------------------------------------------------------

def gradient(draws: Draws, model: nn.Module, how: dict[str, Any] | None, order: str) -> list[Tensor]:
    """Of two micro-batches, one after the other or, as in a pipeline, both forward first."""
    losses, found = [], []
    for sample in (0, 2):
        draws.at(4, sample)
        x = torch.linspace(1, 2, 2 * T * 16, dtype=torch.float64).view(2, T, 16).requires_grad_()
        losses.append((model(x) if how is None else checkpoint(model, x, **how)).square().sum())
        if order == "in turn":
            found.append(torch.autograd.grad(losses[-1], list(model.parameters())))
    if order != "in turn":
        found = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    return [each for grads in found for each in grads]


def test_recomputing() -> None:
    model, _ = made()
    draws = seed_dropout(model, 3)
    wanted = gradient(draws, model, None, "in turn")
    for how, order in (({"use_reentrant": False}, "in turn"),
                       ({"use_reentrant": False, "context_fn": draws.contexts}, "in turn"),
                       ({"use_reentrant": False, "context_fn": draws.contexts}, "both first")):
        for found, other in zip(gradient(draws, model, how, order), wanted, strict=True):
            assert_same_bits(found, other)
    assert (draws.step, draws.sample) == (4, 2)
    with pytest.raises(RuntimeError, match=r"recomputed in backward after draws.at.* context_fn=draws.contexts"):
        gradient(draws, model, {"use_reentrant": False}, "both first")


def test_compiled_graphs_go_on_drawing() -> None:
    torch.compiler.reset()
    model, x = made()
    draws = seed_dropout(model, 3)
    compiled = torch.compile(model, backend="eager")
    for step in range(3):
        draws.at(step)
        found = compiled(x)
        draws.at(step)
        assert_same_bits(found.detach(), model(x).detach())
    torch.compiler.reset()


# --- What is refused --------------------------------------------------------------------------------------------------

def test_one_mask_for_each_turn() -> None:
    drop, draws = one()
    draws.at(1)
    drop(torch.ones(2, 2))
    with pytest.raises(RuntimeError, match="drop is run twice at step 1, sample 0, and would have one mask"):
        drop(torch.ones(2, 2))
    for bad, words in ((Dropout(0.1), r"has no seed: call draws ="), (one()[0], "dropout drop has no step: call")):
        with pytest.raises(RuntimeError, match=words):
            bad(torch.ones(2, 2))


def test_bad_input() -> None:
    drop, draws = one(cuts=[Cut(1, 0, 2, whole=8)])
    draws.at(1)
    with pytest.raises(ValueError, match=r"dimension 1 of \(2, 3\) has 3 here, and its cuts leave 4 of 8: give"):
        drop(torch.ones(2, 3))
    with pytest.raises(ValueError, match="without dimensions"):
        one_at(1)(torch.ones(()))
    with pytest.raises(ValueError, match="'block' means no dropout of this model, which has 0"):
        seed_dropout(nn.Sequential(nn.Dropout(0.1)), 0, {"block": []})
    with pytest.raises(ValueError, match="0 is Dropout2d, and its call is replaced already or not that"):
        seed_dropout(nn.Sequential(nn.Dropout2d(0.1)), 0)
    assert seed_dropout(nn.Sequential(nn.Linear(2, 2)), 0, {"block": []}).seed == 0  # a stage without any


def one_at(step: int) -> Dropout:
    drop, draws = one()
    draws.at(step)
    return drop


def test_models() -> None:
    """Replaced where they stand, by names without wrappers, in training or not; and again with another seed."""
    model = nn.Sequential(Feed(), nn.DataParallel(Feed()).eval())
    draws = seed_dropout(nn.DataParallel(model), 1)
    found = [module for module in model.modules() if isinstance(module, Dropout)]
    assert [module.name for module in found] == ["0.inner", "0.outer", "1.inner", "1.outer"]
    assert [module.training for module in found] == [True, True, False, False]
    assert all(module.draws is draws for module in found)
    again = seed_dropout(model, 2)
    assert found[0].draws is again
    copied = copy.deepcopy(model)
    assert copied[0].inner.draws is copied[0].outer.draws
