"""AdamW as four recipes of training use it, on any list of shapes: plain, whole step, exact master, 8-bit states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch.nn import Parameter

from benchmarks.gpu import peers, shapes
from benchmarks.gpu.bench import OURS, Bench, Make, Step, refill
from fasttrain import LossScaler
from fasttrain.kernels import dispatch
from fasttrain.optim import AdamW

SCALE = 65536.0  # of the loss: torch's first one
OPTIONS: dict[str, Any] = {"lr": peers.LR, "weight_decay": peers.DECAY}


class Recipe(NamedTuple):
    """One row for each list of shapes.

    Attributes:
        bytes: that ours must move for each element.
        held: bytes for each element that the rivals hold together, so that they fit.
        makers: ours and torch's; other packages' are in `table`.
        scale: of the gradients.
        refilled: the step rewrites its gradients.
    """

    section: str
    name: str
    dtype: torch.dtype
    bytes: float
    held: float
    makers: Callable[[torch.device], dict[str, Make]]
    table: Mapping[str, peers.Peer]
    scale: float = 1.0
    refilled: bool = False


def plain(device: torch.device) -> dict[str, Make]:
    """Each of our backends, the one that is chosen first."""
    made: dict[str, Make] = {OURS: lambda params: AdamW(params, **OPTIONS).step}
    if device.type == "cuda" and dispatch.choose(device) == "cuda" and dispatch.load("triton").why_not(device) is None:
        made["fasttrain in Triton"] = lambda params: AdamW(params, **OPTIONS, backend="triton").step
    return made


def whole(device: torch.device) -> dict[str, Make]:
    """Unscale, check, clip, step, zero."""
    def ours(params: list[Parameter]) -> Step:
        optimizer, scaler = AdamW(params, **OPTIONS, zero_gradients=True), LossScaler(SCALE)
        return lambda: scaler.step(optimizer, max_norm=1.0)

    def theirs(params: list[Parameter]) -> Step:
        optimizer = torch.optim.AdamW(params, **OPTIONS, fused=True)
        scaler = torch.amp.GradScaler(device.type, init_scale=SCALE)
        scaler.scale(torch.zeros((), device=device))

        def step() -> None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=False)
        return step
    return {OURS: ours, "torch recipe": theirs}


def clipped(optimizer: Any) -> Step:
    """Our clipping and step."""
    def step() -> None:
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    return step


def with_masters(params: list[Parameter]) -> Step:
    """The recipe of bfloat16 models without this package: fp32 masters, torch's fused step, a copy back."""
    masters = [Parameter(p.detach().float()) for p in params]
    optimizer = torch.optim.AdamW(masters, **OPTIONS, fused=True)
    for master in masters:
        master.grad = torch.empty_like(master)

    def step() -> None:
        torch._foreach_copy_([master.grad for master in masters], [p.grad for p in params])
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(params, masters)
    return step


def split(device: torch.device) -> dict[str, Make]:
    return {OURS: lambda params: clipped(AdamW(params, **OPTIONS, master="split")), "torch recipe": with_masters}


def coded(device: torch.device) -> dict[str, Make]:
    return {OURS: lambda params: clipped(AdamW(params, **OPTIONS, storage="8-byte")), "torch recipe": with_masters}


F32, BF16 = torch.float32, torch.bfloat16
RECIPES = (
    Recipe("adamw", "AdamW, fp32", F32, 28, 64, plain, peers.FP32),
    Recipe("whole", "unscale + inf check + clip + AdamW + zero, fp32", F32, 36, 40, whole, {}, SCALE, True),
    Recipe("split", "clip + AdamW, bf16 with exact fp32 master (split)", BF16, 28, 56, split, peers.MASTERS),
    Recipe("coded", "clip + AdamW, split master, int8 states", BF16, 16.06, 48, coded, peers.CODED),
)


def measured(bench: Bench, recipe: Recipe, of: str, wanted: list[shapes.Shape], section: str,
             budget: float = 12.0) -> dict[str, Any]:
    """One recipe on one list of shapes."""
    kept, note = bench.fitting(wanted, recipe.held)
    elements = shapes.count(kept)
    models = [bench.parameters(kept, recipe.dtype, recipe.scale)
              for _ in range(bench.copies(2 * recipe.dtype.itemsize * elements))]
    before = refill([[p.grad for p in model] for model in models]) if recipe.refilled else None
    theirs, absent = peers.found(recipe.table)
    rivals, failed = bench.rivals({**recipe.makers(bench.device), **theirs}, models, before)
    return bench.row(f"{recipe.name}: {of}", rivals, section=section, elements=elements, each=recipe.bytes,
                     budget=budget, note=note, absent=absent | failed, tensors=len(kept))


def large(recipe: Recipe) -> Callable[[Bench], list[dict[str, Any]]]:
    """A recipe on 1e9 elements in 300 tensors."""
    wanted = shapes.equal(300, 1_000_000_000 // 300)
    return lambda bench: [measured(bench, recipe, "1e9 in 300 tensors", wanted, recipe.section)]


MODELS = {"GPT-2 124M": shapes.gpt2(), "Llama-3-8B": shapes.llama3_8b(), "ResNet-50": shapes.resnet50(),
          "64 experts": shapes.experts()}


def model(of: str) -> Callable[[Bench], Iterable[dict[str, Any]]]:
    """All recipes on the shapes of a model."""
    return lambda bench: (measured(bench, recipe, of, MODELS[of], "shapes", 3.0) for recipe in RECIPES)
