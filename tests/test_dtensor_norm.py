"""Norms and flags of shards: every element counted once, one answer on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
from shards import LAYOUTS, gradients, placed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

from fasttrain import LossScaler
from fasttrain.optim import SGD, AdamW
from fasttrain.optim.local import local


def norms(wire: Any) -> None:
    for mesh_shape, placements in LAYOUTS.values():
        mesh = init_device_mesh("cpu", mesh_shape)
        params = [nn.Parameter(placed(torch.zeros(size), mesh, placements)) for size in ((8, 12), (16, 4, 3), (4, 4))]
        plain, unused = nn.Parameter(torch.zeros(9)), nn.Parameter(placed(torch.zeros(4, 4), mesh, placements))
        for p in params:
            p.grad = placed(torch.ones(p.shape), mesh, placements)
        plain.grad = torch.ones(9)
        count = 9 + sum(p.numel() for p in params)
        optimizer = SGD([*params, plain, unused], lr=1.0)
        for norm_type in (2.0, 1.0, float("inf")):
            wanted = 1.0 if norm_type == float("inf") else count ** (1 / norm_type)
            got = optimizer.clip_grad_norm_(1e9, norm_type)
            assert type(got) is Tensor
            assert got.item() == pytest.approx(wanted, rel=1e-6), (placements, norm_type)
        assert not optimizer.grad_statistics()[1]
        copies = any(one.is_replicate() for one in placements)  # these have it all
        if wire.rank == 3 or copies:  # the flag reaches every rank
            local(params[1].grad).view(-1)[-1:] = float("nan")
        assert optimizer.grad_statistics()[1], placements


def test_a_norm_counts_every_element_once() -> None:
    ranks.run(norms, 4)


def skips(wire: Any) -> None:
    mesh = init_device_mesh("cpu", (2,))
    params = [nn.Parameter(placed(value, mesh, (Shard(0),))) for value in gradients(((6, 4), (1, 4)), 0, torch.float32)]
    optimizer, scaler = AdamW(params, lr=0.1, master="none", ema_decay=0.9), LossScaler(4.0)
    for step, bad in enumerate((False, True, False)):
        for p, grad in zip(params, gradients(((6, 4), (1, 4)), 1 + step, torch.float32), strict=True):
            p.grad = placed(grad, mesh, (Shard(0),))
        if bad and wire.rank == 1:  # which holds nothing of the second parameter
            local(params[0].grad)[0, 0] = float("inf")
        before = [local(p).clone() for p in params]
        scaler.step(optimizer, max_norm=1.0)
        assert optimizer.last_step.skipped == bad
        assert all(torch.equal(local(p), kept) for p, kept in zip(params[:1], before, strict=False)) == bad
        assert optimizer.state[params[0]]["step"].item() == (1, 1, 2)[step]
    assert scaler.get_scale() == 2.0


def test_a_step_is_skipped_on_every_rank() -> None:
    ranks.run(skips, 2)


def gone_on_one_rank(wire: Any) -> None:
    mesh = init_device_mesh("cpu", (2,))
    p, q = (nn.Parameter(placed(torch.ones(4), mesh, (Shard(0),))) for _ in range(2))
    optimizer = SGD([p, q], lr=1.0)
    if wire.rank == 0:
        p.grad = placed(torch.full((4,), 2.0), mesh, (Shard(0),))
    assert optimizer.clip_grad_norm_(1e9).item() == pytest.approx(8**0.5), "half of the gradient, and nothing waits"
    optimizer.step()
    assert local(p).tolist() == ([-1.0, -1.0] if wire.rank == 0 else [1.0, 1.0])


def test_no_gradient_on_one_rank() -> None:
    ranks.run(gone_on_one_rank, 2)


def each_clipped(wire: Any) -> None:
    mesh = init_device_mesh("cpu", (2,))
    values = gradients(((6, 4), (5,)), 0, torch.float32)
    params, wholes = [nn.Parameter(placed(v, mesh, (Shard(0),))) for v in values], [nn.Parameter(v) for v in values]
    ours, theirs = (SGD(some, lr=1.0, clip_each=0.5) for some in (params, wholes))
    for step in range(3):
        for p, q, grad in zip(params, wholes, gradients(((6, 4), (5,)), 1 + step, torch.float32), strict=True):
            p.grad, q.grad = placed(grad, mesh, (Shard(0),)), grad
        ours.step()
        theirs.step()
    for p, q in zip(params, wholes, strict=True):
        torch.testing.assert_close(p.detach().full_tensor(), q.detach(), rtol=1e-6, atol=1e-6)


def test_each_gradient_is_clipped_by_its_whole_norm() -> None:
    ranks.run(each_clipped, 2)
