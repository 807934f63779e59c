"""Models of fully_shard and parallelize_module are stepped, clipped and averaged as the whole."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
from helpers import assert_same_bits
from shards import assert_same_parts, backward, compare, parallel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from fasttrain.optim import AdamW
from fasttrain.optim.local import is_dtensor, local


def trained(wire: Any, axes: dict[str, int], options: dict[str, Any]) -> None:
    mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
    model = parallel(mesh)
    full = {name: p.detach().full_tensor() if is_dtensor(p) else p.detach().clone()
            for name, p in model.named_parameters()}
    wholes = {name: nn.Parameter(value.clone()) for name, value in full.items()}
    ours, theirs = AdamW(model.named_parameters(), **options), AdamW(wholes.items(), **options)
    for step in range(3):
        backward(model, step, wire.rank if axes.keys() == {"dp"} else 0)
        addends = [name for name, p in model.named_parameters() if any(one.is_partial() for one in p.grad.placements)]
        assert ("0.norm.weight" in addends) == (axes.keys() == {"tp"}), addends
        for name, p in model.named_parameters():
            wholes[name].grad = p.grad.full_tensor() if is_dtensor(p.grad) else p.grad
        norm = ours.clip_grad_norm_(0.1)
        torch.testing.assert_close(norm, theirs.clip_grad_norm_(0.1), rtol=1e-6, atol=0.0)
        theirs._clip = ours._clip
        ours.step()
        theirs.step()
        ours.zero_grad()
    params = dict(model.named_parameters())
    compare(ours, theirs, [p for p in params.values() if is_dtensor(p)],
            [wholes[name] for name, p in params.items() if is_dtensor(p)], str(axes))
    if "ema_decay" in options:
        before = {name: local(p).clone() for name, p in params.items()}
        with ours.ema_weights():
            for name, p in params.items():
                if is_dtensor(p):
                    assert_same_parts(p, theirs.state[wholes[name]]["ema"].to(p.dtype), "the average")
        for name, p in params.items():
            assert_same_bits(local(p.detach()), before[name], "afterwards")
        backward(model, 9, 0)  # the next step goes on with what is kept beside the parameters
        for name, p in params.items():
            wholes[name].grad = None if p.grad is None else p.grad.full_tensor() if is_dtensor(p.grad) else p.grad
        ours.step()
        theirs.step()
        compare(ours, theirs, [p for p in params.values() if is_dtensor(p)],
                [wholes[name] for name, p in params.items() if is_dtensor(p)], str(axes))


@pytest.mark.parametrize("axes", [dict(dp=2), dict(tp=2), dict(dp=2, tp=2)], ids=str)
def test_models(axes: dict[str, int]) -> None:
    """fully_shard, parallelize_module, and one over the other; the LayerNorm's gradient is an addend on each rank."""
    ranks.run(trained, torch.Size(axes.values()).numel(), axes, dict(lr=1e-2, ema_decay=0.5))
