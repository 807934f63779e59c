"""What tests of ZeRO share: a model with every kind of parameter, its data, and steps beside an undivided optimizer."""

from __future__ import annotations

from typing import Any

import torch
from helpers import assert_same_bits
from torch import Tensor, nn

from fasttrain.parallel import DataParallel, Zero


class Net(nn.Module):
    """Tied, frozen, unused, empty, transposed, and used on some ranks only; `big` is cut by every number of ranks."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.embed = nn.Embedding(11, 24)
        self.body = nn.ModuleList(nn.Linear(24, 24) for _ in range(3))
        self.big = nn.Linear(24, 130)
        self.back = nn.Linear(130, 24)
        self.back.weight = nn.Parameter(self.back.weight.detach().t().clone().t())
        self.extra = nn.Linear(24, 24)
        self.unused = nn.Linear(5, 3)
        self.frozen = nn.Linear(24, 24).requires_grad_(False)
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.head = nn.Linear(24, 11, bias=False)
        self.head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, x: Tensor, extra: bool = False) -> Tensor:
        h = self.embed(x) + self.empty.sum()
        for layer in self.body:
            h = h + layer(h).relu()
        h = h + self.back(self.big(h).relu())
        h = h + self.frozen(h)
        if extra:
            h = h + self.extra(h)
        return self.head(h)


def model_of(mesh: Any, dtype: torch.dtype = torch.float32, wire: str = "ordered", **options: Any) -> DataParallel:
    torch.manual_seed(0)
    return DataParallel(Net(dtype), mesh=mesh, wire=wire, **{"bucket_cap_mb": 0.02, **options})


def loss_of(model: nn.Module, step: int, rank: int, micro: int = 0) -> Tensor:
    numbers = torch.Generator().manual_seed(1000 * step + 10 * rank + micro)
    x = torch.randint(0, 11, (3, 7), generator=numbers)
    logits = model(x, extra=step % 2 == 0 and rank == 0)  # on one rank, in some steps
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), x.flatten())


def backward(model: DataParallel, step: int, rank: int, micros: int = 1, synchronised: bool = False) -> None:
    """The backward passes of a step; with several, all but the last are not synchronised."""
    for micro in range(micros):
        if synchronised or micro + 1 == micros:
            loss_of(model, step, rank, micro).backward()
        else:
            with model.no_sync():
                loss_of(model, step, rank, micro).backward()


def pair(wire: Any, cls: Any, dtype: torch.dtype, stage: int, options: dict[str, Any],
         wrapped: dict[str, Any] | None = None, **zero: Any) -> Any:
    """A model with ZeRO, and its twin with the optimizer that is not divided."""
    model, twin = model_of(wire, dtype, **(wrapped or {})), model_of(wire, dtype, **(wrapped or {}))
    return model, Zero(model, cls, stage=stage, **zero, **options), twin, cls(twin.module.named_parameters(), **options)


def assert_same_model(model: DataParallel, twin: DataParallel, what: str) -> None:
    for (name, p), q in zip(model.module.named_parameters(), twin.module.parameters(), strict=True):
        assert_same_bits(p.detach(), q.detach(), f"{what}: {name}")
        assert p.stride() == q.stride(), name


def assert_same_state(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    """State dicts that are equal in every bit, stride and option."""
    assert got["param_groups"] == wanted["param_groups"]
    assert got["state"].keys() == wanted["state"].keys()
    for number, state in wanted["state"].items():
        assert got["state"][number].keys() == state.keys()
        for key, value in state.items():
            mine = got["state"][number][key]
            if isinstance(value, Tensor):
                assert_same_bits(mine, value, f"{key} of parameter {number}")
                assert mine.stride() == value.stride(), f"{key} of parameter {number}"
            else:
                assert mine == value, f"{key} of parameter {number}"


def state_bytes(optimizer: Any) -> int:
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values()
               if isinstance(value, Tensor))
