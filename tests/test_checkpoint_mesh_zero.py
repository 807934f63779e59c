"""Storages of a divided optimizer on a mesh: codes in blocks, remainders and averages, of pieces of cut parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from checkpointed import assert_same
from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from fasttrain.checkpoint import Checkpointer, Reader, verify
from fasttrain.optim import AdamW, consolidate
from fasttrain.optim.local import whole_of
from fasttrain.parallel import DataParallel, Mesh, Zero

OPTIONS: dict[str, dict[str, Any]] = {
    "int8": dict(master="split", state_dtype="int8", ema_decay=0.9),
    "drawn": dict(master="stochastic", state_dtype="bf16", state_rounding="stochastic"),
}
PLACES: dict[str, tuple[dict[str, int], int | None]] = {  # sizes of the mesh, stage of ZeRO
    "data 2 x tensor 2, stage 2": (dict(data=2, tensor=2), 2),
    "data 2 x tensor 2": (dict(data=2, tensor=2), None),
    "data 4, stage 1": (dict(data=4), 1),
}


class Run:
    """`up` is cut by rows, in whole blocks; `down` is not cut."""

    def __init__(self, place: str, stored: str, seed: int):
        sizes, stage = PLACES[place]
        torch.manual_seed(seed)
        self.mesh = Mesh(**sizes)
        self.model = nn.Sequential(nn.Linear(512, 10), nn.Tanh(), nn.Linear(10, 768)).to(torch.bfloat16)
        if self.mesh.sizes["tensor"] > 1:
            parallelize_module(self.model, self.mesh["tensor"], {"0": ColwiseParallel(output_layouts=Replicate())})
        self.owner = DataParallel(self.model, mesh=self.mesh, wire="ordered")
        options = dict(lr=1e-2, **OPTIONS[stored])
        self.optimizer: Any = AdamW(self.model.named_parameters(), **options) if stage is None else \
            Zero(self.owner, AdamW, stage=stage, **options)

    def step(self, number: int) -> None:
        """The same samples on every rank, so that the mean is the same however many there are."""
        x = torch.randn(4, 512, generator=torch.Generator().manual_seed(number)).bfloat16()
        self.owner(x).float().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}

    def whole(self) -> dict[str, Any]:
        """Gathered by what has nothing to do with checkpoints."""
        weights = {name: whole_of(p.detach()) if hasattr(p, "placements") else p.detach().clone()
                   for name, p in self.model.named_parameters()}
        states = self.optimizer.consolidate(to=None) if isinstance(self.optimizer, Zero) else \
            consolidate(self.optimizer.state_dict())
        return {"weights": weights, "states": states["state"]}


def works(wire: Any, folder: str, stored: str) -> list[dict[str, Tensor]]:
    sizes = []
    for place in PLACES:
        run = Run(place, stored, 0)
        for number in range(2):
            run.step(number)
        with Checkpointer(f"{folder}/{place}", mesh=run.mesh) as checkpoints:
            saving = checkpoints.save(2, run.state())
            saving.wait()
        sizes.append(saving.nbytes)
        wanted = run.whole()
        for other in PLACES:
            again = Run(other, stored, 1)
            with Checkpointer(f"{folder}/reading {place}", mesh=again.mesh) as checkpoints:
                assert checkpoints.load(again.state(), which=Path(folder, place, f"step-{2:012}")) is not None
            assert_same(again.whole(), wanted, f"{place} into {other}")
            again.step(2)
            if other == place:
                run.step(2)
                assert_same(again.whole(), run.whole(), f"{place}, a step later")
    return sizes


@pytest.mark.parametrize("stored", OPTIONS)
def test_codes_and_averages_go_into_any_other_division(stored: str, tmp_path: Path) -> None:
    sizes = ranks.run(works, 4, str(tmp_path), stored)
    for place, name in enumerate(PLACES):
        path = tmp_path / name / f"step-{2:012}"
        assert verify(path) == []
        everything = sum(tensor.nbytes for tensor in Reader(path).tensors.values())
        assert sum(own[place] for own in sizes) == everything
