"""Full state dicts of sharded runs: every dtype is gathered, and they load where nothing is sharded, and back."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
from shards import GATHERED, LAYOUTS, gradients, placed
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard

from fasttrain.optim import AdamW, consolidate, distribute
from fasttrain.optim.local import is_dtensor, local, part_of
from tests.helpers import assert_same_bits

SPLIT = dict(lr=1e-2, master="split", state_dtype="int8", ema_decay=0.9)
DTYPES = (torch.int16, torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float32)


def every_dtype(wire: Any, name: str) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(256, 256)  # every pattern, NaNs with their payloads
    mesh_shape, placements = LAYOUTS[name]
    mesh = init_device_mesh("cpu", mesh_shape)
    for dtype in DTYPES:
        value = bits.view(dtype)
        if name == "rows":
            value = value[:250]  # uneven
        pattern = placed(torch.zeros(value.shape), mesh, placements)
        part = part_of(value.view(torch.uint8).unflatten(-1, (value.shape[1], -1)), pattern) \
            .flatten(-2).view(dtype)
        cut = DTensor.from_local(part, mesh, placements, run_check=False, shape=value.shape, stride=value.stride())
        (got, plain), = consolidate([(cut, "x")])
        assert plain == "x"
        assert not is_dtensor(got)
        assert got.dtype == dtype
        assert torch.equal(got.view(torch.uint8), value.view(torch.uint8)), (name, dtype)


@pytest.mark.parametrize("name", GATHERED)
def test_every_dtype_on_every_layout(name: str) -> None:
    ranks.run(every_dtype, 4, name)


def addends(wire: Any) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    parts = DTensor.from_local(torch.full((3,), 2, dtype=torch.int32), mesh, [Partial(), Partial()])
    assert consolidate({"sum": parts})["sum"].tolist() == [8, 8, 8]


def test_addends_are_summed() -> None:
    ranks.run(addends, 4)


def trained(size: int) -> tuple[nn.Module, AdamW]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.Linear(128, 64)).bfloat16()
    if size > 1:
        mesh = init_device_mesh("cpu", (size,))
        for part in (*model, model):
            fully_shard(part, mesh=mesh)
    return model, AdamW(model.named_parameters(), **SPLIT)


def advance(model: nn.Module, optimizer: AdamW, step: int) -> None:
    grads = gradients([p.shape for p in model.parameters()], step, torch.bfloat16)
    for p, grad in zip(model.parameters(), grads, strict=True):
        p.grad = placed(grad, p.device_mesh, p.placements) if is_dtensor(p) else grad
    optimizer.step()


def saves(wire: Any) -> tuple[Any, Any, dict[str, Tensor]]:
    model, optimizer = trained(wire.size)
    advance(model, optimizer, 0)
    first = consolidate(optimizer.state_dict(), device="cpu", only_first=True)
    assert bool(first) == (wire.rank == 0)
    full = consolidate(get_optimizer_state_dict(model, optimizer))
    weights = consolidate(model.state_dict())
    assert full["state"]["0.weight"]["remainder"].dtype == torch.int16
    for p, at in zip(model.parameters(), first.get("state", ()), strict=False):
        for key, value in first["state"][at].items():
            assert not is_dtensor(value)
            assert_same_bits(part_of(value, optimizer.state[p][key]), local(optimizer.state[p][key]), key)
    advance(model, optimizer, 1)
    return full, weights, {name: p.detach().full_tensor() for name, p in model.named_parameters()}


def loads(wire: Any, full: Any, weights: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    model, optimizer = trained(wire.size)
    model.load_state_dict(distribute(weights, model.state_dict()))
    set_optimizer_state_dict(model, optimizer, distribute(full, get_optimizer_state_dict(model, optimizer)))
    assert optimizer.state[model[0].weight]["remainder"].dtype == torch.int16
    advance(model, optimizer, 1)
    for name, p in model.named_parameters():
        assert_same_bits(local(p.detach()), part_of(wanted[name], p), name)


@pytest.mark.parametrize("size", [1, 2])
def test_a_full_state_of_two_ranks_goes_on(size: int) -> None:
    full, weights, wanted = ranks.run(saves, 2)[0]
    ranks.run(loads, size, full, weights, wanted)


def refused_by_torch(wire: Any) -> None:
    model, optimizer = trained(wire.size)
    advance(model, optimizer, 0)
    with pytest.raises(RuntimeError, match="Invalid scalar type"):
        get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    cut = placed(torch.ones(4, 2).to(torch.int16), init_device_mesh("cpu", (2,)), (Shard(0),))
    assert consolidate({"a": cut})["a"].dtype == torch.int16
    with pytest.raises(ValueError, match=r"a tensor of shape \(4,\) where the sharded one has \(4, 2\)"):
        distribute({"a": torch.ones(4)}, {"a": cut})


def test_why_torchs_own_does_not_do() -> None:
    """When this fails, torch has learnt to gather int16, and `consolidate` can be taken back."""
    ranks.run(refused_by_torch, 2)
