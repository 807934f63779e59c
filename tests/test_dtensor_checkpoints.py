"""Distributed checkpoints of other numbers of ranks, and states that go to torch and come back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import ranks
import torch
import torch.distributed.checkpoint as dcp
from helpers import assert_same_bits
from shards import gradients, placed
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from fasttrain.optim import AdamW, convert
from fasttrain.optim.local import is_dtensor, local

STORED: dict[str, dict[str, Any]] = {
    "torch": dict(lr=1e-2),
    "split": dict(lr=1e-2, master="split", state_dtype="bf16", ema_decay=0.9),
    "int8": dict(lr=1e-2, master="kahan", state_dtype="int8"),
}


def stored_model(wire: Any, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.Linear(128, 64)).to(dtype)
    if wire.size > 1:
        mesh = init_device_mesh("cpu", (wire.size,))
        for part in (*model, model):
            fully_shard(part, mesh=mesh)
    return model


def advance(model: nn.Module, optimizer: Any, step: int) -> None:
    numbers = torch.Generator().manual_seed(step)
    for p in model.parameters():
        grad = torch.randn(p.shape, generator=numbers).to(p.dtype)
        p.grad = placed(grad, p.device_mesh, p.placements) if is_dtensor(p) else grad
    optimizer.step()


def saves(wire: Any, folder: str, option: str) -> dict[str, Tensor]:
    dtype = torch.float32 if option == "torch" else torch.bfloat16
    model = stored_model(wire, dtype)
    optimizer = AdamW(model.named_parameters(), **STORED[option])
    for step in range(2):
        advance(model, optimizer, step)
    dcp.save({"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)},
             checkpoint_id=folder)
    advance(model, optimizer, 2)
    return {name: p.detach().full_tensor() for name, p in model.named_parameters()}


def loads(wire: Any, folder: str, option: str) -> dict[str, Tensor]:
    dtype = torch.float32 if option == "torch" else torch.bfloat16
    model = stored_model(wire, dtype)
    optimizer = AdamW(model.named_parameters(), **STORED[option])
    weights, state = model.state_dict(), get_optimizer_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    model.load_state_dict(weights)
    set_optimizer_state_dict(model, optimizer, state)
    advance(model, optimizer, 2)
    assert optimizer.state[model[0].weight]["step"].item() == 3
    return {name: p.detach().full_tensor() if is_dtensor(p) else p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("option", STORED)
def test_a_checkpoint_of_two_ranks_goes_on_with_one_and_four(option: str, tmp_path: Any) -> None:
    wanted = ranks.run(saves, 2, str(tmp_path), option)[0]
    for size in (1, 2, 4):
        for got in ranks.run(loads, size, str(tmp_path), option):
            for name, value in wanted.items():
                assert_same_bits(got[name], value, f"{option}, {size} ranks: {name}")


def exchanged(wire: Any) -> None:
    mesh = init_device_mesh("cpu", (2,))
    values = gradients(((6, 4), (5,)), 0, torch.float32)
    params = [[nn.Parameter(placed(v, mesh, (Shard(0),))) for v in values] for _ in range(2)]
    ours, theirs = AdamW(params[0], lr=1e-2), torch.optim.AdamW(params[1], lr=1e-2)

    def advance_both(step: int) -> None:
        for some, optimizer in zip(params, (ours, theirs), strict=True):
            for p, grad in zip(some, gradients(((6, 4), (5,)), step, torch.float32), strict=True):
                p.grad = placed(grad, mesh, (Shard(0),))
            optimizer.step()
        for p, q in zip(*params, strict=True):
            torch.testing.assert_close(local(p.detach()), local(q.detach()), rtol=1e-6, atol=1e-7)
            assert ours.state[p]["exp_avg"].placements == theirs.state[q]["exp_avg"].placements

    advance_both(1)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))  # torch, too, takes the tensors as they are
    advance_both(2)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    advance_both(3)
    narrow = [nn.Parameter(p.detach().bfloat16()) for p in params[0]]
    split = AdamW(narrow, lr=1e-2, master="split", state_dtype="bf16")
    split.load_state_dict(convert(ours.state_dict(), split))
    for p, q in zip(narrow, params[0], strict=True):
        p.grad = torch.ones_like(p)
        moments = split.state[p]["exp_avg"]
        assert_same_bits(local(moments), local(ours.state[q]["exp_avg"]).bfloat16())
        assert moments.placements == p.placements
    split.step()


def test_states_go_to_torch_and_come_back() -> None:
    ranks.run(exchanged, 2)
