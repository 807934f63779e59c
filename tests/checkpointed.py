"""What tests of checkpoints share: a model and its optimizer at any stage of ZeRO, steps, and their whole state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh

from fasttrain import optim
from fasttrain.checkpoint import Rng
from fasttrain.optim import consolidate
from fasttrain.optim.local import is_dtensor
from fasttrain.parallel import DataParallel, Zero, shard

STORED: dict[str, tuple[torch.dtype, str, dict[str, Any]]] = {  # dtype of the parameters, optimizer, its options
    "fp32": (torch.float32, "AdamW", {}),
    "torch": (torch.float32, "torch.AdamW", {}),
    "split bf16": (torch.bfloat16, "AdamW", dict(master="split", state_dtype="bf16", ema_decay=0.9)),
    "8-byte": (torch.bfloat16, "AdamW", dict(storage="8-byte")),
    "5-byte": (torch.bfloat16, "Lion", dict(storage="5-byte")),
    "fp8 kahan": (torch.bfloat16, "AdamW", dict(master="kahan", state_dtype="e4m3", ema_decay=0.9, ema_dtype="bf16")),
    "mixed": (torch.bfloat16, "NAdam", dict(storage="mixed")),
    "schedule-free": (torch.float32, "ScheduleFreeAdamW", {}),
    "muon": (torch.float32, "Muon", {}),
    "adafactor": (torch.float32, "Adafactor", {}),
    "soap": (torch.float32, "SOAP", {}),
    "momentum": (torch.float32, "SGD", dict(momentum=0.9)),
}


class Small(nn.Module):
    """Tied, transposed, with buffers, and of sizes that every number of ranks cuts."""

    def __init__(self, plain: bool):
        super().__init__()
        self.embed = nn.Embedding(16, 64)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)) for _ in range(2))
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 16, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(3))
        if not plain:  # block codes want row-major parameters
            weight = self.blocks[0][0].weight
            self.blocks[0][0].weight = nn.Parameter(weight.detach().t().clone().t())

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = h + block(h)
        return self.head(self.norm(h))


class Run:
    """A model, its optimizer and a schedule on one rank of `wire`, at a stage: 0 to 3, or None without any wrapper."""

    def __init__(self, wire: Any, stage: int | None, stored: str, seed: int = 0):
        dtype, kind, options = STORED[stored]
        torch.manual_seed(seed)
        self.wire, self.stage = wire, stage
        self.bare = Small(plain=stage == 3 or stored not in ("fp32", "momentum")).to(dtype)
        self.model: Any = self.bare
        cls = getattr(torch.optim if kind.startswith("torch.") else optim, kind.removeprefix("torch."))
        options = dict(lr=1e-2, **options)
        if stage == 3:
            self.sharded = shard(self.bare, init_device_mesh("cpu", (wire.size,)), watch=False)
        elif stage is not None:
            self.model = DataParallel(self.bare, mesh=wire, wire="ordered", bucket_cap_mb=0.02)
        groups = [{"params": [(name, p) for name, p in self.bare.named_parameters() if (p.ndim < 2) == small],
                   "weight_decay": 0.0 if small else 0.1} for small in (False, True)]
        self.optimizer = Zero(groups, cls, stage=stage, **options) if stage in (1, 2) else cls(groups, **options)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 20)

    def state(self, **more: Any) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule, "rng": Rng(), **more}

    def step(self, number: int, rank: int = 0) -> None:
        """One step on the batch of this number; the same on every rank unless it is given."""
        numbers = torch.Generator().manual_seed(1000 * number + rank)
        x = torch.randint(0, 16, (2, 5), generator=numbers)
        h = nn.functional.dropout(self.model(x).float(), 0.1)
        nn.functional.cross_entropy(h.flatten(0, 1), x.flatten()).backward()
        self.bare.seen += 1
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()

    def whole(self) -> dict[str, Any]:
        """Everything, gathered by what has nothing to do with checkpoints: a collective."""
        weights = {name: value.full_tensor() if is_dtensor(value) else value.clone()
                   for name, value in self.bare.state_dict().items()}
        if isinstance(self.optimizer, Zero):
            state = self.optimizer.consolidate(to=None)
            names = [name for group in self.optimizer.param_groups for name in group["param_names"]]
            states = {names[number]: own for number, own in state["state"].items()}
        elif self.stage == 3:
            states = consolidate(get_optimizer_state_dict(self.bare, self.optimizer))["state"]
        else:
            names = [name for group in self.optimizer.param_groups for name in group["param_names"]]
            states = {names[number]: own for number, own in self.optimizer.state_dict()["state"].items()}
        left = ("params", "param_names", "differentiable")  # the last one torch adds to groups that are loaded
        options = [{key: value for key, value in group.items() if key not in left}
                   for group in self.optimizer.param_groups]
        return {"weights": weights, "states": states, "options": options, "lr": self.schedule.get_last_lr(),
                "draw": torch.rand(3, generator=torch.Generator().set_state(torch.get_rng_state()))}


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    if isinstance(tree, dict):
        return {inner: leaf for key, value in tree.items() for inner, leaf in flat(value, f"{path}/{key}").items()}
    if isinstance(tree, (list, tuple)):
        return {inner: leaf for key, value in enumerate(tree) for inner, leaf in flat(value, f"{path}/{key}").items()}
    return {path: tree}


def assert_same(got: Any, wanted: Any, what: str = "", leave: tuple[str, ...] = ()) -> None:
    """Two trees are equal in every bit."""
    mine, theirs = flat(got), flat(wanted)
    assert mine.keys() == theirs.keys(), f"{what}: {sorted(mine.keys() ^ theirs.keys())}"
    for path, value in theirs.items():
        if path.startswith(leave):
            continue
        if isinstance(value, Tensor):
            assert mine[path].dtype == value.dtype, f"{what}: {path}"
            assert mine[path].shape == value.shape, f"{what}: {path}"
            assert torch.equal(*(one.detach().contiguous().reshape(-1).view(torch.uint8)
                                 for one in (mine[path], value))), f"{what}: {path}"
        else:
            assert mine[path] == value, f"{what}: {path}"
