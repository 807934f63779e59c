"""Shards that are stepped as their gradients arrive, in groups, beside frozen parameters."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import ranks
import torch
from helpers import assert_same_bits
from shards import backward, parallel
from torch.distributed.device_mesh import init_device_mesh

from fasttrain.optim import AdamW
from fasttrain.optim.local import local


def around(wire: Any) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    one, other = parallel(mesh), parallel(mesh)
    for p in (one[1].bias, other[1].bias):
        p.requires_grad_(False)
    arriving, usual = (AdamW(list(model[0].parameters()), lr=1e-2) for model in (one, other))
    for model, optimizer in ((one, arriving), (other, usual)):
        optimizer.add_param_group({"params": model[1].parameters(), "lr": 1e-3})
    arriving.step_on_arrival()
    for step in range(3):
        for model, optimizer in ((one, arriving), (other, usual)):
            backward(model, step, wire.rank)
            assert all((p.grad is None) == (optimizer is arriving or not p.requires_grad) for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert_same_bits(local(p.detach()), local(q.detach()))

    twin = copy.deepcopy(usual)
    for p, q in zip(other.parameters(), itertools.chain(*(g["params"] for g in twin.param_groups)), strict=True):
        if p.requires_grad:
            p.grad = torch.ones_like(p)
            q.grad = torch.ones_like(q)
    torch.nn.utils.clip_grad_norm_([p for p in other.parameters() if p.requires_grad], 0.5)
    twin.clip_grad_norm_(0.5)
    usual.step()
    twin.step()
    for p, q in zip(other.parameters(), itertools.chain(*(g["params"] for g in twin.param_groups)), strict=True):
        torch.testing.assert_close(local(p.detach()), local(q.detach()), rtol=1e-6, atol=1e-7)


def test_arrival_groups_frozen_parameters_and_copies() -> None:
    ranks.run(around, 2)
