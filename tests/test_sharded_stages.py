"""Stage 3 in the stages of a pipeline, by torch's own schedules: one reduction for each unit and step, one norm."""

from __future__ import annotations

from typing import Any

import onmesh
import pytest
import ranks
import torch
from onmesh import Model, parallelized, term_of, tokens_of, whole
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleInterleavedZeroBubble, schedules
from torch.testing import assert_close

from fasttrain.optim import AdamW
from fasttrain.parallel import Mesh, shard

CLOSE = dict(rtol=1e-10, atol=1e-10)
PARTS = ["embed", "blocks.0", "blocks.1", "head"]
MICROS = 4


class Held(Model):
    """Some parts of the model, which stages run."""

    def keep(self, parts: list[str]) -> None:
        if "embed" not in parts:
            del self.embed
        if "head" not in parts:
            del self.norm, self.head
        for place in range(len(self.blocks)):
            if f"blocks.{place}" not in parts:
                self.blocks._modules.pop(str(place))

    def run(self, parts: list[str], x: Tensor) -> Tensor:
        for part in parts:
            x = self.head(self.norm(x)) if part == "head" else self.get_submodule(part)(x)
        return x


class View(nn.Module):
    def __init__(self, model: Held, parts: list[str]):
        super().__init__()
        self.__dict__["of"] = model, parts

    def parameters(self, recurse: bool = True) -> Any:
        model, parts = self.of
        names = [*parts, *(["norm"] if "head" in parts else [])]
        return iter({id(p): p for name in names for p in model.get_submodule(name).parameters()}.values())

    def forward(self, x: Tensor) -> Tensor:
        model, parts = self.of
        return model.run(parts, x)


class Stage(PipelineStage):
    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Not by torch."""


def losses(logits: Tensor, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flip(1).flatten()) / MICROS


def inputs(step: int, term: int) -> Tensor:
    return torch.cat([tokens_of(step, term, micro) for micro in range(MICROS)])


def trained(wire: Any, sizes: dict[str, int], schedule: str, tied: bool, sequence: bool) -> None:
    mesh = Mesh(data=1, **sizes, watch=False)
    here, several = mesh.coordinates["pipeline"], 2 if schedule == "zero bubble" else 1
    count = 2 * several
    mine = [[PARTS[here], PARTS[2 + here]]] if several == 2 else [PARTS[2 * here : 2 * here + 2]]
    held = [[part] for part in mine[0]] if several == 2 else mine
    model, alone = parallelized(Held(tied), mesh, sequence), Model(tied)
    model.keep([part for parts in held for part in parts])
    name = "embed.weight" if here == 0 else "head.weight"
    sharded = shard(model, mesh, blocks="blocks", tied={name: (0, 1)} if tied else None)
    ours = AdamW(model.named_parameters(), lr=1e-2)
    theirs = torch.optim.AdamW(alone.parameters(), lr=1e-2)
    length = 4 // mesh.sizes["tensor"] if sequence else 4
    hidden = torch.zeros(3, length, onmesh.WIDTH, dtype=torch.float64, requires_grad=True)
    logits = torch.zeros(3, 4, onmesh.ROWS, dtype=torch.float64, requires_grad=True)
    stages = []
    for part, parts in enumerate(held):
        index = here + 2 * part
        given = torch.zeros(3, 4, dtype=torch.long) if index == 0 else hidden
        stages.append(Stage(View(model, parts), index, count, mesh.device, input_args=(given,), output_args=(
            logits if index == count - 1 else hidden,), group=mesh["pipeline"].get_group()))
    options = dict(n_microbatches=MICROS, loss_fn=losses, scale_grads=False)
    made: Any = ScheduleInterleavedZeroBubble(stages, **options) if several == 2 else \
        getattr(schedules, schedule)(stages[0], **options)
    known = dict(alone.named_parameters(remove_duplicate=False))
    for step in range(2):
        x, told = inputs(step, term_of(mesh)), []
        before = sharded.wire.calls["reduce_scatter"]
        with sharded.paused():
            if mesh.last_stage:
                made.step(*([x] if several == 2 and here == 0 else []), target=x, losses=told)
            else:
                made.step(x)
        assert sharded.wire.calls["reduce_scatter"] == before
        sharded.finish()
        assert sharded.wire.calls["reduce_scatter"] - before == len([part for part in model.modules() if isinstance(
            part, torch.distributed.fsdp.FSDPModule) and any(True for _ in part._get_fsdp_state()._fsdp_param_groups)])
        wanted = onmesh.gradients(alone, step, mesh.terms, MICROS)
        loss = torch.stack(told).sum().detach() if told else torch.zeros((), dtype=torch.float64)
        assert_close(sharded.losses(loss)[0], wanted.double(), **CLOSE)
        for name, p in model.named_parameters():
            assert_close(whole(p.grad), known[name].grad, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
        squares, _ = sharded.statistics(ours)
        assert_close(squares.sqrt(), torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.05), **CLOSE)
        ours.clip_grad_norm_(0.05, norm=squares.sqrt())
        ours.step()
        theirs.step()
        ours.zero_grad()
    for name, p in model.named_parameters():
        assert_close(whole(p.detach()), known[name].detach(), **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    assert_close(ours.clip_grad_norm_(1e9).double().square(), torch.tensor(
        float(sum(p.numel() for p in alone.parameters())), dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("sizes", "schedule", "tied", "sequence"), [
    (dict(pipeline=2, shard=2), "Schedule1F1B", True, False),
    (dict(pipeline=2, shard=2), "zero bubble", False, False),
    (dict(pipeline=2, shard=2, tensor=2), "ScheduleGPipe", True, True),
], ids=str)
def test_stages_train_as_one_process(sizes: dict[str, int], schedule: str, tied: bool, sequence: bool) -> None:
    ranks.run(trained, torch.Size([*sizes.values()]).numel(), sizes, schedule, tied, sequence)
