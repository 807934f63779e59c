"""Plans of one's own: any module, words and torch's styles, divided and whole positions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from divided import STEPS, compare, entropy, lively, whole
from ranks import run
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

from fasttrain.dist.mesh import Mesh
from fasttrain.losses import cross_entropy
from fasttrain.optim import AdamW
from fasttrain.optim.local import is_dtensor
from fasttrain.parallel import seed_dropout
from fasttrain.parallel.tensor import tensor_parallel
from fasttrain.parallel.tensor.moves import CUT, JOIN
from fasttrain.parallel.tensor.partial import declared
from fasttrain.parallel.tensor.styles import Column, Style


class Mixing(nn.Module):
    """Needs all positions: adds a layer of their mean to each."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x.mean(1, keepdim=True))


class Own(nn.Module):
    """Not of this package: biases everywhere, positions of its own, queries, keys and values apart, a tied head."""

    def __init__(self, tokens: int, width: int = 12, heads: int = 4, padding: int | None = None):
        super().__init__()
        self.features = width // heads
        self.tokens, self.positions = nn.Embedding(tokens, width, padding_idx=padding), nn.Embedding(12, width)
        self.first, self.second, self.last = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        # A bias of keys adds the same to all products of a query: its gradient is nothing but rounding.
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=name != "k") for name in "qkvo")
        self.feed = nn.Sequential(nn.Linear(width, 20), nn.GELU(), nn.Linear(20, width))
        self.mixing, self.head = Mixing(width), nn.Linear(width, tokens)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1])[None])
        y = self.first(x)
        q, k, v = (part(y).unflatten(-1, (-1, self.features)).transpose(1, 2) for part in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return self.head(self.last(self.mixing(x + self.feed(self.second(x)))))


PLAN = {"[qkv]": "column", "o": "row", "feed.0": "column", "feed.2": "row", "tokens": "vocabulary",
        "head": "vocabulary", "first": "sequence", "second": "sequence", "last": "sequence", "positions": "replicate",
        "mixing": "replicate"}


def own(dtype: torch.dtype, tokens: int, padding: int | None = None) -> nn.Module:
    return lively(Own(tokens, padding=padding)).to(dtype)


def trained(wire: Any, size: int, cases: Any) -> list[dict[str, float]]:
    mesh, found = Mesh(tensor=size), []
    torch.manual_seed(1)
    for dtype, bound, tokens, options in cases:
        batches = list(torch.randint(tokens, (STEPS, 3, 13)))
        found.append(compare(own(dtype, tokens, padding=2), mesh, batches, entropy, bound, plan=PLAN, **options))
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_a_model_of_ones_own(size: int) -> None:
    """Vocabularies that divide, that do not, and that leave a rank without tokens."""
    run(trained, size, size, [
        (torch.float64, 1e-10, 40, {}), (torch.float64, 1e-10, 41, dict(sequence=True)),
        (torch.float64, 1e-10, 5, dict(loss="whole")), (torch.float64, 1e-10, 5, dict(sequence=True)),
        # The largest error of an element is some units in the last place of the largest: of a sum of 36 products.
        (torch.float32, 1e-4, 41, dict(sequence=True))])


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def square(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) ** 2).mean()


def mixed(wire: Any, size: int) -> None:
    mesh = Mesh(tensor=size)
    batches = list(torch.randn(STEPS, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    words = {"up": "column", "down": "row"}
    for sequence, plan in ((False, words), (True, {"": Style(CUT, JOIN), "norm": "sequence", **words}),
                           (False, {"up": ColwiseParallel(), "down": RowwiseParallel()}),
                           (False, {"up": "column", "down": "row", "norm": "sequence"})):
        compare(lively(Perceptron().double()), mesh, batches, square, 1e-10, plan=plan, sequence=sequence)
    compare(lively(nn.Sequential(Perceptron(), Perceptron()).double()), mesh, batches, square, 1e-10,
            plan={"*.up": ColwiseParallel(), "*.down": RowwiseParallel(), "0.norm": "replicate"})


def test_words_and_styles_of_torch() -> None:
    run(mixed, 2, 2)


def kept(wire: Any, size: int) -> None:
    """What stays, what is declared, and what a copy and a model of other values do."""
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tensor",))
    torch.manual_seed(wire.rank)  # every rank draws other values: those of the first count
    model, alone = own(torch.float64, 7), own(torch.float64, 7)
    drawn = [torch.randn_like(p) for p in alone.parameters()]
    with torch.no_grad():
        for p, value in zip(model.parameters(), drawn, strict=True):
            p.copy_(value)
        for p, value in zip(alone.parameters(), drawn, strict=True):
            p.copy_(wire.broadcast_(value.clone()))
    for p in model.tokens.parameters():
        p.requires_grad_(False)
    assert tensor_parallel(model, mesh, PLAN, sequence=True) is model
    assert model.head.weight is model.tokens.weight
    assert not model.head.weight.requires_grad
    for (name, p), (other, q) in zip(model.named_parameters(), alone.named_parameters(), strict=True):
        assert name == other
        assert p.shape == q.shape
        assert torch.equal(whole(p.detach()), q.detach()), name
        assert declared(p) == (name.split(".")[0] in ("first", "second", "last") or name in ("o.bias", "feed.2.bias"))
        assert is_dtensor(p) == (declared(p) or name.split(".")[0] not in ("mixing", "positions")), name
    assert model.state_dict().keys() == alone.state_dict().keys()
    tokens = torch.arange(12).view(1, 12) % 7
    twin = copy.deepcopy(model)
    with torch.no_grad():
        wanted = alone(tokens)
        torch.testing.assert_close(model(tokens).full_tensor(), wanted)
        for p in twin.parameters():
            p.zero_()
        assert twin(tokens).full_tensor().count_nonzero() == 0
        torch.testing.assert_close(model(tokens).full_tensor(), wanted)
    with torch.device("meta"):
        meta = tensor_parallel(Own(7), mesh, PLAN)
    assert [tuple(p.shape) for p in meta.parameters()] == [tuple(p.shape) for p in model.parameters()]
    assert all(p.is_meta for p in meta.parameters())
    local = [p._local_tensor.shape[0] for p in (meta.tokens.weight, meta.q.bias)]
    assert local == [-(-7 // size) if wire.rank < size - 1 else 7 - (size - 1) * -(-7 // size), 12 // size]
    with pytest.raises(IndexError):
        model(torch.full((1, 12), 7))
    with pytest.raises(IndexError):
        model(torch.full((1, 12), -1))


def test_what_stays_as_it_was() -> None:
    run(kept, 2, 2)


def ones(wire: Any, size: int) -> None:
    mesh = Mesh(tensor=size)
    for sequence in (False, True):
        model = tensor_parallel(own(torch.float32, 41), mesh, PLAN, sequence=sequence)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        norm = AdamW(model.parameters()).clip_grad_norm_(1.0)
        elements = sum(p.numel() for p in model.parameters())
        assert abs(norm.item() - elements ** 0.5) <= 1e-6 * norm.item()
        torch_own = tensor_parallel(Perceptron(), mesh, {"up": "column", "down": "row", "norm": SequenceParallel()})
        assert all(declared(p) for p in torch_own.norm.parameters())


@pytest.mark.parametrize("size", [2, 4])
def test_gradients_of_one_have_the_norm_of_their_number(size: int) -> None:
    run(ones, size, size)


class Dropping(nn.Module):
    """Positions are divided by the embedding; dropout in between them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.drop, self.feed = nn.Embedding(9, 8), nn.Dropout(0.3), Perceptron()
        self.head = nn.Linear(8, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.feed(self.drop(self.tokens(tokens))))


def told(model: nn.Module, tokens: Tensor) -> Tensor:
    model.drop.draws.at(3)
    return cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])


def dropping(wire: Any, size: int) -> None:
    mesh = Mesh(tensor=size)
    plan = {"tokens": "vocabulary", "drop": "sequence", "feed.up": "column", "feed.down": "row",
            "feed.norm": "sequence", "head": "vocabulary"}
    batches = list(torch.arange(39).view(1, 3, 13).expand(STEPS, 3, 13) % 9)
    for sequence in (False, True):
        compare(lively(Dropping().double()), mesh, batches, entropy, 1e-10, plan=plan, sequence=sequence)
        by_place = lively(Dropping().double())
        seed_dropout(by_place, 5)
        torch.manual_seed(wire.rank)  # which nothing depends on
        compare(by_place, mesh, batches, told, 1e-10, plan=plan, sequence=sequence)
    model = tensor_parallel(Dropping(), mesh, plan)
    torch.manual_seed(wire.rank)
    model.eval()(batches[0])
    with pytest.raises(RuntimeError, match="seeded with 0, 1, are not in one state"):
        model.train()(batches[0])


def test_what_is_dropped_is_what_one_process_drops() -> None:
    """And ranks whose generators are not alike say so."""
    run(dropping, 2, 2)


def test_pieces_of_a_bias() -> None:
    mesh = type("", (), {"size": lambda self: 2, "get_local_rank": lambda self: 1})()
    assert Column(None, pieces=3).part(torch.arange(12), mesh).tolist() == [2, 3, 6, 7, 10, 11]
