"""What lies around the step of a divided model: optimizers, groups, norms, bad gradients and copies that stay equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from composed import CLIP, Alone, Composition, Divided, batch, blank, filled, groups
from ranks import run
from torch import Tensor, nn

from fasttrain import optim
from fasttrain.dist.mesh import Mesh
from fasttrain.guards.decay import decay_groups
from fasttrain.losses import cross_entropy
from fasttrain.optim.local import local
from fasttrain.parallel import DataParallel, shard
from fasttrain.parallel.drift import DriftError, check_copies
from fasttrain.parallel.pipeline import Pipeline, split
from fasttrain.precision.loss_scale import LossScaler
from fasttrain.train.stepper import Stepper

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "Muon": lambda given: optim.Muon(given, lr=0.02), "LAMB": lambda given: optim.LAMB(given, lr=0.01),
    "Adafactor": lambda given: optim.Adafactor(given, lr=0.01), "Lion": lambda given: optim.Lion(given, lr=1e-3),
    "LARS": lambda given: optim.LARS(given, lr=0.1, momentum=0.9),
    "StableAdamW": lambda given: optim.StableAdamW(given, lr=0.01),
    "ScheduleFreeAdamW": lambda given: optim.ScheduleFreeAdamW(given, lr=0.01),
    "clip_each": lambda given: optim.AdamW(given, lr=0.01, clip_each=0.05),
    "torch": lambda given: torch.optim.AdamW(given, lr=0.01)}
TIED = Composition({"pipeline": 2}, micro=2, tied=True)
EXPERTS = Composition({"expert": 2, "tensor": 2}, experts=4, sequence=True)
BAD_STEP = 1  # of three: of one parameter on one rank the gradient is infinite


def stage(how: Composition) -> tuple[Mesh, Any]:
    mesh = Mesh(**how.mesh, watch=False)
    model = blank(how, mesh)
    return mesh, filled(split(model, mesh, costs=[1.0] * len(model.parts())))


def entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits, targets, inplace_backward=False)


# --- Steps, one of them skipped -------------------------------------------------------------------------------------

def stepped(wire: Any, how: Composition, kind: str, victim: int) -> tuple[list[Any], dict[str, Tensor]]:
    mesh = Mesh(**how.mesh, watch=False)
    divided = Divided(how, mesh)
    optimizer = OPTIMIZERS[kind](groups(divided.bare))
    ours = kind != "torch"
    scaler = LossScaler(16.0) if ours else None
    pipeline = divided.pipeline
    stepper = Stepper(divided.wrapped, optimizer, (lambda model, given: given) if pipeline is not None else (
        lambda model, given: divided.loss(model(given[0]), given[1])), clip=CLIP, scaler=scaler, pipeline=pipeline)
    step = 0

    def spoil(grad: Any) -> Any:
        if step == BAD_STEP:
            grad = grad.clone()
            local(grad).view(-1)[:1] = float("inf")
        return grad

    def after(module: nn.Module, given: Any, output: Any) -> None:
        if output.requires_grad:
            output.register_hook(spoil)

    if wire.rank == victim:
        next(part for name, part in divided.bare.named_modules() if name.endswith(".out")).register_forward_hook(after)
    numbers = []
    for step in range(3):
        before = [local(p.detach()).clone() for p in divided.bare.parameters()]
        tokens = batch(step).chunk(mesh.replicas)[mesh.replica]
        given = [tokens] if pipeline is not None else tokens.chunk(how.micro)
        stepper.run([(one[:, :-1], one[:, 1:]) for one in given])
        (found,) = stepper.arrived(all_of_them=True)
        moved = [not torch.equal(a, local(b.detach())) for a, b in zip(before, divided.bare.parameters(), strict=True)]
        assert any(moved) != found.skipped
        numbers.append((found.skipped, None if found.skipped else found.norm, found.scale))
        check_copies(divided.wrapped, mesh)
    return numbers, divided.parameters()


@pytest.mark.parametrize(("how", "kind", "victim"), [
    (TIED, "torch", 1), (EXPERTS, "LAMB", 2),
    (Composition({"pipeline": 2, "shard": 2}, zero=3, micro=2, tied=True), "torch", 3),
    (Composition({"shard": 2, "expert": 2}, zero=3, experts=4), "torch", 0),
    (Composition({"pipeline": 2, "tensor": 2}, micro=2, tied=True), "Muon", 3),
    (Composition({"shard": 2, "tensor": 2}, zero=3, sequence=True), "Adafactor", 1),
    (Composition({"pipeline": 2, "expert": 2}, experts=4, micro=2), "StableAdamW", 2),
    (Composition({"shard": 2}, zero=3), "LARS", 1), (TIED, "ScheduleFreeAdamW", 0),
    (Composition({"expert": 2}, experts=4), "clip_each", 1), (Composition({"tensor": 2}, tied=True), "Lion", 0),
], ids=str)
def test_optimizers_step_and_skip_as_on_one_process(how: Composition, kind: str, victim: int) -> None:
    alone, expected = Alone(how), []
    optimizer = OPTIMIZERS[kind](groups(alone.model))
    for step in range(3):
        alone.backward(step)
        if skipped := step == BAD_STEP:
            expected.append((True, None))
        else:
            norm = torch.nn.utils.clip_grad_norm_(alone.model.parameters(), CLIP) if kind == "torch" else \
                optimizer.clip_grad_norm_(CLIP)
            expected.append((skipped, norm.item()))
            optimizer.step()
        optimizer.zero_grad()
    named = dict(alone.model.named_parameters(remove_duplicate=False))
    for numbers, parameters in run(stepped, how.world, how, kind, victim):
        assert [skipped for skipped, *_ in numbers] == [skipped for skipped, _ in expected]
        assert [norm for _, norm, _ in numbers] == [None if norm is None else pytest.approx(norm, rel=1e-6)
                                                    for _, norm in expected]
        assert [scale for *_, scale in numbers] == ([1.0] * 3 if kind == "torch" else [16.0, 16.0, 8.0])
        for name, p in parameters.items():  # torch's clips by a norm of float32
            bound = 1e-7 if kind == "torch" else 1e-10
            torch.testing.assert_close(p, named[name].detach(), rtol=bound, atol=bound,
                                       msg=lambda text, name=name: name + text)


# --- Norms of all stages ---------------------------------------------------------------------------------------------

def norms(wire: Any, wrapped: bool, frozen: int | None) -> tuple[float, float, float, bool]:
    mesh, model = stage(TIED if frozen is None else Composition({"pipeline": 2}, micro=2))
    if mesh.coordinates["pipeline"] == frozen:
        model.requires_grad_(False)
    pipeline = Pipeline(DataParallel(model, mesh=mesh) if wrapped else model, mesh, entropy, micro_batches=2)
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    pipeline.step(batch(0)[:, :-1], batch(0)[:, 1:])
    with pytest.raises(ValueError, match="norm_type=1"):
        optimizer.clip_grad_norm_(CLIP, norm_type=1.0)
    found = pipeline.statistics(optimizer)[0].sqrt().item(), optimizer.clip_grad_norm_(CLIP).item()
    optimizer.zero_grad()
    pipeline.step(batch(1)[:, :-1], batch(1)[:, 1:])
    if mesh.last_stage:
        next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = float("nan")
    before = [p.detach().clone() for p in model.parameters()]
    scaler = LossScaler(1.0)
    scaler.step(optimizer)
    same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return *found, scaler.get_scale(), same


@pytest.mark.parametrize(("wrapped", "frozen"), [(False, None), (True, 0), (False, 0)])
def test_without_a_replica_or_a_trained_parameter_a_stage_has_the_norm_of_all(wrapped: bool, frozen: int | None
                                                                             ) -> None:
    alone = Alone(TIED if frozen is None else Composition({"pipeline": 2}))
    if frozen is not None:
        for name, p in alone.model.named_parameters():
            p.requires_grad_(not name.startswith(("embedding", "blocks.0")))
    alone.backward(0)
    norm = sum(p.grad.square().sum() for p in alone.model.parameters() if p.grad is not None).sqrt().item()
    for told, clipped, scale, same in run(norms, 2, wrapped, frozen):
        assert told == pytest.approx(norm, rel=1e-10)
        assert clipped == pytest.approx(norm, rel=1e-6)
        assert scale == 0.5
        assert same, "every stage skips"


# --- Copies ----------------------------------------------------------------------------------------------------------

def grouped(wire: Any, how: str) -> tuple[list[list[str]], str]:
    axes = {} if how == "bare" else {"shard": 2} if how == "shard" else {"data": 2}
    mesh, model = stage(Composition({"pipeline": 2, **axes}, tied=True, dtype=torch.bfloat16))
    wrapped: Any = {"bare": lambda: model, "data": lambda: DataParallel(model, mesh=mesh),
                    "shard": lambda: shard(model, mesh, blocks="blocks")}[how]()
    pipeline = Pipeline(wrapped, mesh, entropy, micro_batches=2)
    seen: list[str] = []
    given = decay_groups(wrapped if how == "data" else model, 0.1, embeddings=False,
                         decays=lambda name, p: seen.append(name))
    names = [[name.removeprefix("module.") for name, _ in group["params"]] for group in given]
    assert "embedding.bytes.weight" in seen
    optimizer = optim.AdamW(given, lr=0.01, master="stochastic")  # draws are by the name in the whole model
    for step in range(2):
        tokens = batch(step).chunk(mesh.replicas)[mesh.replica]
        pipeline.step(tokens[:, :-1], tokens[:, 1:])
        pipeline.update(optimizer, CLIP)
        optimizer.zero_grad()
        check_copies(wrapped, mesh)
    other = optim.SGD([{"params": model.parameters(), "lr": 0.1 * (1 + mesh.coordinates["pipeline"])}])
    pipeline.step(tokens[:, :-1], tokens[:, 1:])
    with pytest.raises(ValueError, match="would drift apart") as raised:
        pipeline.update(other)
    return names, str(raised.value)


@pytest.mark.parametrize("how", ["bare", "data", "shard"])
def test_tied_copies_are_in_groups_with_the_same_options(how: str) -> None:
    answers = run(grouped, 2 if how == "bare" else 4, how)
    (first, _), (last, _) = answers[0], answers[-1]
    assert "embedding.bytes.weight" in first[1]
    assert "head.weight" in last[1]
    assert len({text for _, text in answers}) == 1
    assert "embedding.bytes.weight" in answers[0][1]
    assert "lr=0.1, that of stage 1 lr=0.2" in answers[0][1].replace(" for it", "")


def half_frozen(wire: Any, how: str, all_stages: bool) -> str:
    axes = {} if how == "bare" else {"shard": 2} if how == "shard" else {"data": 2}
    mesh, model = stage(Composition({"pipeline": 2, **axes}, tied=True))
    for name, p in model.named_parameters():
        p.requires_grad_(not (name.endswith("bytes.weight") or (all_stages and name == "head.weight")))
    try:
        wrapped: Any = model if how == "bare" else shard(model, mesh, blocks="blocks") if how == "shard" else \
            DataParallel(model, mesh=mesh)
        pipeline = Pipeline(wrapped, mesh, entropy, micro_batches=2)
    except ValueError as error:
        return str(error)
    tokens = batch(0).chunk(mesh.replicas)[mesh.replica]
    pipeline.step(tokens[:, :-1], tokens[:, 1:])
    return str(pipeline.update(optim.AdamW(model.parameters(), lr=0.01)).item())


@pytest.mark.parametrize("how", ["bare", "data", "shard"])
def test_a_tied_parameter_is_frozen_on_all_its_stages_or_on_none(how: str) -> None:
    size = 2 if how == "bare" else 4
    assert set(run(half_frozen, size, how, False)) == {
        "embedding.bytes.weight has copies on several stages, of which [1] train it and [0] do not: freeze it on all "
        "of them, or on none"}
    alone = Alone(TIED)
    alone.model.head.weight.requires_grad_(False)
    alone.backward(0)
    norm = sum(p.grad.square().sum() for p in alone.model.parameters() if p.grad is not None).sqrt().item()
    assert [float(told) for told in run(half_frozen, size, how, True)] == [pytest.approx(norm, rel=1e-6)] * size


def drifting(wire: Any) -> list[str]:
    told = []
    mesh = Mesh(pipeline=2, tensor=2, watch=False)
    divided = Divided(Composition({"pipeline": 2, "tensor": 2}, micro=2, tied=True), mesh)
    check_copies(divided.wrapped, mesh)
    for name, rank in (("head.weight", 3), ("blocks.0.norm_feed.weight", 1), ("blocks.0.qkv.weight", 1)):
        p = dict(divided.bare.named_parameters()).get(name)
        if wire.rank == rank:
            local(p.detach()).view(-1).view(torch.int64)[-1] ^= 1
        try:
            check_copies(divided.wrapped, mesh)
            told.append("")
        except DriftError as error:
            told.append(str(error).partition("\n")[2])
        if wire.rank == rank:
            local(p.detach()).view(-1).view(torch.int64)[-1] ^= 1
    return told


def test_one_bit_of_a_copy_is_found() -> None:
    (tie, copy, part), *others = run(drifting, 4)
    assert all(answer == [tie, copy, part] for answer in others)
    assert tie == "embedding.bytes.weight tensor 1: on ranks 3 it is not that of rank 1"
    assert copy == "blocks.0.norm_feed.weight: on ranks 1 it is not that of rank 0"
    assert part == "", "nobody has another copy"
