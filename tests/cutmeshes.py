"""What tests of checkpoints on meshes share: a model with every kind of parameter, cut by hand as each mesh has it."""

from __future__ import annotations

import math
import zlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fasttrain import optim
from fasttrain.checkpoint import PerRank, Rng
from fasttrain.dist.mesh import Mesh
from fasttrain.optim.local import is_dtensor, local, positions

PARTS = ("embed", "mix", "up", "norm", "down", "head")
MESHES: dict[str, dict[str, int]] = {  # of up to four ranks; a single process has none
    "single": {},
    "tensor 2": dict(tensor=2),
    "pipeline 2": dict(pipeline=2),
    "expert 2": dict(expert=2),
    "data 2 x tensor 2": dict(data=2, tensor=2),
    "shard 2 x tensor 2": dict(shard=2, tensor=2),
    "data 2 x shard 2": dict(data=2, shard=2),
    "pipeline 2 x tensor 2": dict(pipeline=2, tensor=2),
    "expert 2 x context 2": dict(expert=2, context=2),
    "expert 2 x tensor 2": dict(expert=2, tensor=2),
    "pipeline 2 x shard 2": dict(pipeline=2, shard=2),
    "pipeline 4": dict(pipeline=4),
}
STORED: dict[str, tuple[torch.dtype, Any, dict[str, Any]]] = {
    "ours": (torch.float64, optim.AdamW, dict(ema_decay=0.9)),
    "torch": (torch.float64, torch.optim.AdamW, {}),
    "split": (torch.bfloat16, optim.AdamW, dict(master="split", state_dtype="bf16", ema_decay=0.9)),
    "adafactor": (torch.float64, optim.Adafactor, {}),
}


def ranks_of(name: str) -> int:
    return math.prod(MESHES[name].values())


class Experts(nn.Module):
    """Stacked weights, and a buffer that every rank counts by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 16, 6))
        self.register_buffer("seen", torch.zeros(3))

    def get_extra_state(self) -> Any:
        return {"experts": 4}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"experts": 4}


def mesh_of(name: str) -> Mesh | None:
    return Mesh(**MESHES[name]) if MESHES[name] else None


def whole_model(seed: int, dtype: torch.dtype, tied: bool = True) -> nn.Sequential:
    """Of sizes that meshes cut evenly but for `up.bias`; `up.weight` is large enough to be divided among copies."""
    made = [nn.Embedding(12, 16), Experts(), nn.Linear(16, 1030), nn.LayerNorm(16), nn.Linear(1030, 16),
            nn.Linear(16, 12, bias=False)]
    model = nn.Sequential(OrderedDict(zip(PARTS, made, strict=True))).to(dtype)
    if tied:
        model.head.weight = model.embed.weight  # type: ignore[union-attr]
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(noise(f"{seed}/{name}", p.shape))
        model.mix.seen.fill_(seed)  # type: ignore[union-attr, operator]
    return model


def noise(key: str, shape: Any) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())), dtype=torch.float64)


def stage(model: nn.Sequential, mesh: Mesh) -> nn.Sequential:
    """The parts of a pipeline's stage, under their names; a tied head without its embedding says to what it was."""
    number, stages = mesh.coordinates["pipeline"], mesh.sizes["pipeline"]
    low, high = (len(PARTS) * at // stages for at in (number, number + 1))
    made = nn.Sequential(OrderedDict((part, getattr(model, part)) for part in PARTS[low:high]))
    if "head" in PARTS[low:high] and "embed" not in PARTS[low:high] and model.head.weight is model.embed.weight:
        made.whole_ties = {"head.weight": "embed.weight"}  # type: ignore[assignment]
    return made


def cut(model: nn.Sequential, mesh: Mesh) -> nn.Sequential:
    """What a rank of a mesh holds of a model."""
    tied = model.head.weight is model.embed.weight
    model = stage(model, mesh)
    if mesh.sizes["expert"] > 1 and hasattr(model, "mix"):
        axes = ("expert", "tensor") if mesh.sizes["tensor"] > 1 else ("expert",)
        model.mix.weight = nn.Parameter(placed(model.mix.weight, mesh[axes], [Shard(0), Shard(1)][:len(axes)]))
    if mesh.sizes["tensor"] > 1:
        plan = {"embed": RowwiseParallel(input_layouts=Replicate()), "up": ColwiseParallel(),
                "down": RowwiseParallel(), "head": ColwiseParallel()}
        parallelize_module(model, mesh["tensor"], {part: how for part, how in plan.items() if hasattr(model, part)})
    if tied and hasattr(model, "head") and hasattr(model, "embed"):
        model.head.weight = model.embed.weight
    if mesh.sizes["shard"] > 1:
        fully_shard(model, mesh=mesh["data", "shard"])
    return model


def placed(value: Tensor, mesh: Any, placements: Any) -> DTensor:
    whole = DTensor.from_local(value.detach(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(mesh, placements)


class Run:
    """A model on a mesh, its optimizer, a schedule and more. Gradients are functions of parameters and their names."""

    def __init__(self, mesh: Mesh | None, stored: str = "ours", seed: int = 0, tied: bool = True,
                 alter: Callable[[nn.Sequential], None] | None = None):
        dtype, kind, options = STORED[stored]
        self.mesh = mesh
        whole = whole_model(seed, dtype, tied)
        if alter is not None:
            alter(whole)
        self.model = whole if mesh is None else cut(whole, mesh)
        named = [[(name, p) for name, p in self.named() if (p.ndim < 2) == small] for small in (False, True)]
        # By the whole model's names are random draws, which are to be the same wherever a parameter lies. Groups that
        # have no parameters at this stage are there too; torch wants no names then.
        self.optimizer = kind([{"params": own if all(named) else [p for _, p in own], "weight_decay": decay}
                               for own, decay in zip(named, (0.1, 0.0), strict=True)], lr=1e-2, **options)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 20)
        self.steps = 0
        self.own = Counter(0 if mesh is None else mesh.rank)

    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule, "rng": Rng(),
                "own": self.own, "config": {"width": 16}}

    def named(self) -> list[tuple[str, Any]]:
        """Its parameters, by the names of the whole model."""
        ties = getattr(self.model, "whole_ties", {})
        return [(ties.get(name, name), p) for name, p in self.model.named_parameters()]

    def step(self) -> None:
        for name, p in self.named():
            own, more = local(p.detach()), noise(f"gradient {self.steps}/{name}", p.shape)
            grad = (3 * own.double()).sin() + 0.1 * part(more, p)
            p.grad = grad.to(p.dtype) if not is_dtensor(p) else DTensor.from_local(
                grad.to(p.dtype), p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.steps += 1

    def held(self) -> dict[str, tuple[list[Tensor], Tensor]]:
        """Of every weight and state here, by the whole model's names: the indices that are held, and the elements."""
        found = {name: at(value) for name, value in self.model.state_dict().items() if isinstance(value, Tensor)}
        for name, p in self.named():
            for key, value in self.optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    found[f"{name}/{key}"] = at(value)
        return found


class Counter(PerRank):
    """Of every rank its own; on other numbers of ranks, a function of what was."""

    def __init__(self, rank: int):
        self.seen = rank

    def state_dict(self) -> Any:
        return {"seen": self.seen}

    def load_state_dict(self, state: Any) -> None:
        self.seen = state["seen"]

    def of_rank(self, state: Any, rank: int, world: int) -> None:
        self.seen = state["seen"] if rank < world else 1000 * world + state["seen"]


def at(value: Any) -> tuple[list[Tensor], Tensor]:
    return positions(value) if is_dtensor(value) else [torch.arange(n) for n in value.shape], local(value.detach())


def part(whole: Tensor, like: Any) -> Tensor:
    """What is held of `like`, of another whole."""
    return taken(whole, positions(like)) if is_dtensor(like) else whole


def taken(whole: Tensor, index: list[Tensor]) -> Tensor:
    for dim, held in enumerate(index):
        whole = whole.index_select(dim, held)
    return whole
