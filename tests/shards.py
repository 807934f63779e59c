"""What tests of DTensors share: meshes and placements, parts of a whole, and a small parallel model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_same_bits
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from fasttrain.optim.local import is_dtensor, local

LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {  # of meshes of four ranks: mesh, placements
    "rows": ((4,), (Shard(0),)),
    "columns": ((4,), (Shard(1),)),
    "copies": ((4,), (Replicate(),)),
    "hybrid": ((2, 2), (Replicate(), Shard(0))),
    "blocks": ((2, 2), (Shard(0), Shard(1))),
    "rows of rows": ((2, 2), (Shard(0), Shard(0))),
    "fully_shard over columns": ((2, 2), (_StridedShard(0, split_factor=2), Shard(0))),
    "strided": ((2, 2), (_StridedShard(0, split_factor=2), Replicate())),
}

# torch 2.11 raises where it gathers the last one ("unable to be interpreted"), which nothing but a test makes.
OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12)
GATHERED = [
    pytest.param(name, marks=pytest.mark.skipif(OLD and name == "strided", reason="torch 2.11 cannot gather it"))
    for name in LAYOUTS]


def placed(value: Tensor, mesh: Any, placements: Any) -> DTensor:
    """A DTensor made of the part that this process holds: nothing is sent."""
    whole = DTensor.from_local(value.clone(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    if not any(isinstance(one, _StridedShard) for one in placements):
        return whole.redistribute(mesh, placements)
    # torch's own definition, not the one under test
    mine = value
    for dim, one in enumerate(placements):
        if not one.is_replicate():
            mine = one._split_tensor(mine, mesh.size(dim), with_padding=False)[0][mesh.get_local_rank(dim)]
    return DTensor.from_local(mine.contiguous(), mesh, placements, run_check=False, shape=value.shape,
                              stride=value.stride())


def gradients(shapes: Any, step: int, dtype: torch.dtype) -> list[Tensor]:
    numbers = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=numbers).to(dtype) for shape in shapes]


def assert_same_parts(got: Any, whole: Tensor, what: str) -> None:
    """The local part is what this process would hold of the whole."""
    assert got.shape == whole.shape, what
    pattern = placed(whole.contiguous(), got.device_mesh, got.placements)
    assert_same_bits(local(got.detach()), local(pattern), what)


def compare(ours: Any, theirs: Any, params: Any, wholes: Any, what: str) -> None:
    for i, (p, q) in enumerate(zip(params, wholes, strict=True)):
        assert_same_parts(p, q.detach(), f"{what}: parameter {i}")
        assert ours.state[p].keys() == theirs.state[q].keys()
        for key, value in theirs.state[q].items():
            mine = ours.state[p][key]
            assert is_dtensor(mine) == (value.dim() > 0), f"{what}: {key}"
            if is_dtensor(mine):
                assert mine.placements == p.placements
                assert_same_parts(mine, value, f"{what}: {key} of parameter {i}")
            else:
                assert_same_bits(mine, value, f"{what}: {key}")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def parallel(mesh: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), nn.Linear(12, 7))
    if "tp" in (mesh.mesh_dim_names or ()):
        plan = {"0.norm": SequenceParallel(), "0.up": ColwiseParallel(input_layouts=Shard(1)),
                "0.down": RowwiseParallel(output_layouts=Shard(1))}
        parallelize_module(model[0], mesh["tp"], {key[2:]: one for key, one in plan.items()})
        parallelize_module(model[1], mesh["tp"], RowwiseParallel(input_layouts=Shard(1)))
    if "dp" in (mesh.mesh_dim_names or ()):
        for part in model:
            fully_shard(part, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    return model


def backward(model: nn.Module, step: int, rank: int) -> None:
    numbers = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(3, 8, 12, generator=numbers)
    first = model[0].norm.weight
    if is_dtensor(first) and "tp" in first.device_mesh.mesh_dim_names:  # its part of every sequence
        x = x.chunk(2, dim=1)[first.device_mesh["tp"].get_local_rank()]
    model(x).square().mean().backward()
