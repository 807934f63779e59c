"""Optimizers with reductions: a checkpoint of two ranks goes on with one, two and four."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
import torch.distributed.checkpoint as dcp
from shards import gradients, placed
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fasttrain.optim import LAMB, SOAP, Adafactor
from fasttrain.optim.local import is_dtensor


def stored(wire: Any, kind: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 9, bias=False), nn.Linear(9, 5)).double()
    if wire.size > 1:
        mesh = init_device_mesh("cpu", (wire.size,))
        for part in (*model, model):
            fully_shard(part, mesh=mesh)
    return model, kind(model.named_parameters(), lr=1e-2)


def advance(model: nn.Module, optimizer: Any, step: int) -> dict[str, Tensor]:
    shapes = [p.shape for p in model.parameters()]
    for p, grad in zip(model.parameters(), gradients(shapes, step, torch.float64), strict=True):
        p.grad = placed(grad, p.device_mesh, p.placements) if is_dtensor(p) else grad
    optimizer.step()
    return {name: p.detach().full_tensor() if is_dtensor(p) else p.detach() for name, p in model.named_parameters()}


def saves(wire: Any, folder: str, kind: Any) -> dict[str, Tensor]:
    model, optimizer = stored(wire, kind)
    for step in range(2):
        advance(model, optimizer, step)
    dcp.save({"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)},
             checkpoint_id=folder)
    return advance(model, optimizer, 2)


def loads(wire: Any, folder: str, kind: Any) -> dict[str, Tensor]:
    model, optimizer = stored(wire, kind)
    weights, state = model.state_dict(), get_optimizer_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    model.load_state_dict(weights)
    set_optimizer_state_dict(model, optimizer, state)
    return advance(model, optimizer, 2)


@pytest.mark.parametrize("kind", [LAMB, Adafactor, SOAP])
def test_a_checkpoint_of_two_ranks_goes_on_with_one_and_four(kind: Any, tmp_path: Any) -> None:
    wanted = ranks.run(saves, 2, str(tmp_path), kind)[0]
    for size in (1, 2, 4):
        for got in ranks.run(loads, size, str(tmp_path), kind):
            for name, value in wanted.items():
                torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-14)  # the order of the sums
