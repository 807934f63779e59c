"""Models built on meta: the same bits for any mesh, placement and stage, and only this process's part in memory."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import ranks
import torch
from helpers import assert_same_bits
from shards import LAYOUTS, OLD, assert_same_parts, placed
from torch import Tensor, nn

from benchmarks.allocated import peak
from fasttrain.optim.local import local
from fasttrain.parallel.building import Normal, Ones, Uniform, Zeros, materialize
from fasttrain.parallel.building.places import indices
from fasttrain.parallel.tensor.partial import declare, declared
from fasttrain.train.model import GPT

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = ((8, 12), (16, 4, 3), (12,), (8, 1), (4, 10))


class Bag(nn.Module):
    """Parameters of some shapes."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.held = nn.ParameterList(nn.Parameter(torch.empty(shape, dtype=dtype)) for shape in SHAPES)


def fits(shape: tuple[int, ...], placements: Any) -> bool:
    return all(getattr(one, "dim", 0) < len(shape) for one in placements)


def cut(wire: Any, names: list[str]) -> None:
    """Parameters of every layout that fits: their parts are those of the whole, in chunks of any size."""
    from torch.distributed.device_mesh import init_device_mesh

    meshes = {shape: init_device_mesh("cpu", shape) for shape in ((4,), (2, 2))}
    for name in names:
        mesh_shape, placements = LAYOUTS[name]
        mesh = meshes[mesh_shape]
        rules = {"*": Normal(0.5)}
        with torch.device("meta"):
            whole, model = Bag(), Bag()
        materialize(whole, seed=7, rules=rules)
        for index, p in enumerate(model.held):
            if fits(p.shape, placements):
                model.held[index] = nn.Parameter(placed(torch.empty(p.shape), mesh, placements).to("meta"))
        materialize(model, seed=7, rules=rules)
        for p, wanted in zip(model.held, whole.held, strict=True):
            if not hasattr(p, "placements"):
                assert_same_bits(p.detach(), wanted.detach())
                continue
            assert_same_parts(p, wanted.detach(), name)
            number = placed(torch.arange(p.numel()).view(p.shape), mesh, placements)
            found = torch.cat([places for _, places in indices(p, torch.device("cpu"), 5)] + [torch.zeros(0).long()])
            assert torch.equal(found, local(number).flatten())


def test_any_placement() -> None:
    ranks.run(cut, 4, [name for name in LAYOUTS if name != "strided" or not OLD])


def uneven(wire: Any) -> None:
    """Shards of unequal size, and ranks without any."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (wire.size,))
    for shape, dim in (((5, 3), 0), ((3, 5), 1), ((2, 4), 0), ((1,), 0), ((3, 7, 2), 1)):
        with torch.device("meta"):
            model, whole = nn.Module(), nn.Module()
            whole.w = nn.Parameter(torch.empty(shape))
            model.w = nn.Parameter(distribute_tensor(torch.empty(shape), mesh, [Shard(dim)]))
        for one in (whole, model):
            materialize(one, seed=1, rules={"w": Uniform()})
        assert_same_bits(model.w.full_tensor().detach(), whole.w.detach(), f"{shape} {dim}")


@pytest.mark.parametrize("size", [2, 4])
def test_uneven_parts(size: int) -> None:
    ranks.run(uneven, size)


# --- Models -----------------------------------------------------------------------------------------------------------

class Small(nn.Module):
    """A little of everything: an embedding, a norm, tied weights, tables that are computed."""

    tables: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embedding.weight
        self.tied = {"head.weight": "embedding.weight"}
        self.build_buffers()

    def build_buffers(self) -> None:
        self.register_buffer("tables", torch.arange(16.0).cos(), persistent=False)

    def initial(self) -> dict[str, Any]:
        return {"embedding.weight": Normal(0.25), "down.weight": Zeros()}

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x) + self.tables
        return self.head(x + self.down(torch.relu(self.up(self.norm(x)))))


def built(seed: int = 3, **options: Any) -> Small:
    with torch.device("meta"):
        model = Small()
    return materialize(model, seed=seed, **options)


def test_rules_in_their_order() -> None:
    model = built(rules={"norm.*": Ones(), "n*.bias": Zeros()}).requires_grad_(False)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert model.head.weight is model.embedding.weight
    assert_same_bits(model.norm.bias.detach(), torch.ones(16))  # the first that fits
    assert_same_bits(model.down.weight.detach(), torch.zeros(16, 32))
    assert_same_bits(model.tables, torch.arange(16.0).cos())
    assert 0.2 < float(model.embedding.weight.std()) < 0.3
    assert 0.24 < float(model.up.weight.abs().max()) <= 0.25  # of torch: within 1 / sqrt(16)
    same, other = built(), built(seed=4)
    assert_same_bits(same.up.weight.detach(), model.up.weight.detach())
    assert not torch.equal(other.up.weight, model.up.weight)


def test_tied_tensors_that_have_become_two() -> None:
    """As where a plan has cut each: they have the rule of one, and the same values."""
    with torch.device("meta"):
        model = Small()
    model.head.weight = nn.Parameter(model.head.weight.detach())
    model.initial = lambda: {}
    materialize(model, seed=3)
    assert model.head.weight is not model.embedding.weight
    assert_same_bits(model.head.weight.detach(), model.embedding.weight.detach())
    assert float(model.head.weight.detach().std()) > 0.9


def test_a_stage_without_what_it_is_tied_to() -> None:
    """Its copy has the same values, by the name of the other; without a rule for that it is refused."""
    whole = built()
    with torch.device("meta"):
        stage = Small()
    del stage.embedding
    materialize(stage, seed=3)
    assert_same_bits(stage.head.weight.detach(), whole.embedding.weight.detach())
    with torch.device("meta"):
        lost = Small()
    del lost.embedding
    lost.initial = lambda: {"down.weight": Zeros()}
    with pytest.raises(ValueError, match=r"parameter head.weight \(40, 16\) of Linear, tied to embedding.weight"):
        materialize(lost, seed=3)


def test_wrappers_change_no_name() -> None:
    wrapper = importlib.import_module("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")

    with torch.device("meta"):
        model = Small()
    model.up = wrapper.checkpoint_wrapper(model.up)
    materialize(torch.compile(model, backend="eager"), seed=3)
    assert_same_bits(model.up.weight.detach(), built().up.weight.detach())


def test_gpt_in_stages() -> None:
    """Of the main job's model every part has the values of the whole."""
    rules = {"*norm*": Ones(), "*": Normal(0.02)}

    def make(parts: list[str] | None = None) -> GPT:
        with torch.device("meta"):
            model = GPT(layers=2, width=16, heads=2, positions=8, vocabulary=31, tied=True)
        if parts:
            model.keep(parts)
        return materialize(model, seed=5, rules={"cos": Zeros(), "sin": Zeros(), **rules})

    whole = dict(make().named_parameters())
    for parts in (["embedding", "blocks.0"], ["blocks.1", "head"]):
        for name, p in make(parts).named_parameters():
            same = {"head.weight": "embedding.bytes.weight"}.get(name, name)
            assert_same_bits(p.detach(), whole[same].detach(), name)


def divided(wire: Any, how: str) -> None:
    """`parallelize_module`, `fully_shard` and both, on meta; then one pass."""
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, wire.size // 2), mesh_dim_names=("shard", "tensor"))
    with torch.device("meta"):
        model = Small()
    if "tensor" in how:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(model, mesh["tensor"], plan)
        declare(model.norm.weight)
    if "fully" in how:
        for part in (model.up, model.down, model):
            fsdp.fully_shard(part, mesh=mesh["shard"])
    materialize(model, seed=3)
    wanted = built()
    assert declared(model.norm.weight) == (how == "tensor")  # fully_shard has made another parameter
    assert model.head.weight is model.embedding.weight
    for (name, p), other in zip(model.named_parameters(), wanted.parameters(), strict=True):
        found = p.detach()
        assert_same_bits(found.full_tensor() if hasattr(found, "full_tensor") else found, other.detach(), name)
    x = torch.arange(12).view(2, 6)
    torch.testing.assert_close(model(x), wanted(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["tensor", "fully", "tensor and fully"])
def test_divided_models(how: str) -> None:
    ranks.run(divided, 4, how)


def test_everything() -> None:
    """What is there already is drawn where it lies."""
    model = Small()
    weight, version = model.up.weight, model.up.weight._version
    materialize(model, seed=3, everything=True)
    assert model.up.weight is weight
    assert weight._version > version
    for one, other in zip(model.parameters(), built().parameters(), strict=True):
        assert_same_bits(one.detach(), other.detach())
    before = copy.deepcopy(model.state_dict())
    materialize(model, seed=9)
    for name, value in model.state_dict().items():
        assert_same_bits(value, before[name])


# --- Memory -----------------------------------------------------------------------------------------------------------

def memory(wire: Any) -> tuple[int, int]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (wire.size,))
    with torch.device("meta"):
        model = nn.ModuleList(nn.Linear(1024, 1024) for _ in range(8))
        for index, layer in enumerate(model):
            layer.weight = nn.Parameter(distribute_tensor(layer.weight, mesh, [Shard(index % 2)]))
    return peak(lambda: materialize(model, seed=0)), sum(local(p).nbytes for p in model.parameters())


def test_memory() -> None:
    """The local parts, and a few arrays of one chunk."""
    for most, own in ranks.run(memory, 4):
        assert own < 8 * (1 << 20) * 4 / 4 * 1.01
        assert most <= own + 14 * 8 * (1 << 16) + (1 << 20)


# --- Bad input --------------------------------------------------------------------------------------------------------

class Odd(nn.Module):
    """A parameter and a buffer of which nobody knows anything."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(3))
        self.good = nn.Linear(2, 2)
        self.register_buffer("table", torch.zeros(4))


def test_without_a_rule() -> None:
    with torch.device("meta"):
        model = nn.Sequential(Odd())
    with pytest.raises(ValueError, match="2 tensors on meta would have no values") as error:
        materialize(model, seed=0)
    assert "parameter 0.gain (3,) of Odd: rules={'0.gain': Normal(0.02)}, or a method initial()" in str(error.value)
    assert "buffer 0.table (4,) of Odd: a method build_buffers() of the module, or a rule" in str(error.value)
    assert all(p.is_meta for p in model.parameters())
    materialize(model, seed=0, rules={"*.gain": Ones(), "*.table": Zeros()})
    assert_same_bits(model[0].table, torch.zeros(4))


def test_refused() -> None:
    with torch.device("meta"):
        model = Odd()
    for rules, words in (({"gain": 0.02}, "rules: 'gain' has 0.02, which is no rule"), ([1], "it is a dict from")):
        with pytest.raises(TypeError, match=words):
            materialize(model, seed=0, rules=rules)  # type: ignore[arg-type]
    model.build_buffers = lambda: None
    with pytest.raises(ValueError, match="left table on meta: it is to assign a tensor of shape"):
        materialize(model, seed=0, rules={"gain": Ones()})
    with pytest.raises(ValueError, match="weight is lazy, and has no shape yet"):
        materialize(nn.LazyLinear(3), seed=0)
