"""What tests on a mesh of several axes share: a model, its plan over "tensor", and the same training in one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from fasttrain.parallel import Mesh
from fasttrain.parallel.tensor import partial

ROWS, WIDTH, HIDDEN = 13, 8, 20


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, tied: bool = False, dtype: torch.dtype = torch.float64):
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Embedding(ROWS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, ROWS, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def parallelized(model: Model, mesh: Mesh, sequence: bool) -> Model:
    """Cut over mesh["tensor"]; with `sequence` norms see a part of the positions, and their gradients are addends."""
    if mesh.sizes["tensor"] == 1:
        return model
    tied = model.head.weight is model.embed.weight
    inner = Shard(1) if sequence else Replicate()
    plan: dict[str, Any] = {"embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=inner),
                            "head": ColwiseParallel(input_layouts=inner, output_layouts=Replicate())}
    for place in range(len(model.blocks)):
        plan[f"blocks.{place}.up"] = ColwiseParallel(input_layouts=inner)
        plan[f"blocks.{place}.down"] = RowwiseParallel(output_layouts=inner)
        if sequence:
            plan[f"blocks.{place}.norm"] = SequenceParallel()
    if sequence:
        plan["norm"] = SequenceParallel()
    parallelize_module(model, mesh["tensor"], plan)
    if tied:
        model.head.weight = model.embed.weight
    if sequence:
        for name, p in model.named_parameters():
            if "norm" in name:
                partial.declare(p)
    return model


def tokens_of(step: int, term: int, micro: int) -> Tensor:
    return torch.randint(0, ROWS, (3, 4), generator=torch.Generator().manual_seed(1000 * step + 10 * term + micro))


def loss_of(model: nn.Module, tokens: Tensor, reduction: str = "mean") -> Tensor:
    logits = model(tokens)
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flip(1).flatten(), reduction=reduction)


def term_of(mesh: Mesh) -> int:
    """Which of the losses of a mean this rank computes: all axes but these divide one of them."""
    return mesh.index("data", "shard", "expert", "context")


def gradients(model: nn.Module, step: int, terms: int, micros: int) -> Tensor:
    """Set the mean gradient over all terms and micro-batches, as one process has it; the mean loss."""
    model.zero_grad()
    total = torch.zeros(())
    for term in range(terms):
        for micro in range(micros):
            loss = loss_of(model, tokens_of(step, term, micro)) / (terms * micros)
            loss.backward()
            total = total + loss.detach()
    return total


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
