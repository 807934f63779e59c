"""Tensors that are cut over meshes of any kind, tensor parallelism's too: saved once, and loaded whole or cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ranks
import torch
from helpers import assert_same_bits
from shards import LAYOUTS, placed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from fasttrain.checkpoint import Checkpointer, Reader
from fasttrain.optim.local import local

SHAPES = ((6, 8), (5,), (3, 4, 5), (), (0, 4), (4, 1))


def whole() -> nn.ParameterList:
    numbers = torch.Generator().manual_seed(0)
    return nn.ParameterList(torch.randn(shape, generator=numbers) for shape in SHAPES)


def cut(layout: str, fill: float | None = None) -> nn.ParameterList:
    """The same, placed on four ranks as far as the placements have a dimension to cut."""
    sizes, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", sizes)
    params = []
    for p in whole():
        fits = all(one.is_replicate() or one.dim < p.dim() for one in placements)
        value = p.detach() if fill is None else torch.full_like(p, fill).detach()
        params.append(nn.Parameter(placed(value, mesh, placements) if fits else value))
    return nn.ParameterList(params)


def saves(wire: Any, folder: str) -> list[int]:
    sizes = []
    for layout in LAYOUTS:
        with Checkpointer(f"{folder}/{layout}", wire=wire) as checkpoints:
            sizes.append(checkpoints.save(1, {"model": cut(layout)}).nbytes)
    return sizes


def loads(wire: Any, folder: str) -> None:
    for source in ("plain", "fully_shard over columns"):
        for layout in LAYOUTS:
            got, wanted = cut(layout, fill=7.0), cut(layout)
            with Checkpointer(f"{folder}/reading", wire=wire) as checkpoints:
                loaded = checkpoints.load({"model": got}, which=Path(folder, source, "step-000000000001"))
            assert loaded is not None
            assert loaded.bytes_read == sum(local(p).nbytes for p in got)
            for number, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
                assert_same_bits(local(mine.detach()), local(theirs.detach()), f"{source} to {layout}: {number}")


def test_every_placement(tmp_path: Path) -> None:
    sizes = ranks.run(saves, 4, str(tmp_path))
    for place, layout in enumerate(LAYOUTS):
        path = tmp_path / layout / "step-000000000001"
        everything = sum(stored.nbytes for stored in Reader(path).tensors.values())
        assert sum(own[place] for own in sizes) == everything == sum(p.nbytes for p in whole())
        model = nn.ParameterList(torch.zeros(shape) for shape in SHAPES)
        with Checkpointer(tmp_path / layout) as checkpoints:
            checkpoints.load({"model": model})
        for mine, theirs in zip(model, whole(), strict=True):
            assert_same_bits(mine.detach(), theirs.detach(), layout)
    with Checkpointer(tmp_path / "plain") as checkpoints:
        checkpoints.save(1, {"model": whole()}).wait()
    ranks.run(loads, 4, str(tmp_path))
