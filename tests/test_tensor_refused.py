"""What cannot be divided: one error on every rank, with sizes and what to do, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import run
from test_tensor_plans import PLAN, Own, Perceptron
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from fasttrain.dist.mesh import Mesh
from fasttrain.optim.local import is_dtensor
from fasttrain.parallel.tensor import tensor_parallel
from fasttrain.parallel.tensor.styles import Style
from fasttrain.train.model import GPT

UP, DOWN = {"up": "column"}, {"down": "row"}


def gpt(**options: Any) -> nn.Module:
    return GPT(**{**dict(layers=2, width=24, heads=6, positions=8), **options})


class Counts(nn.Module):
    """A block as the GPT's, with a parameter that its plan does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = gpt(heads=4).blocks
        self.blocks[1].scale = nn.Parameter(torch.ones(24))


def tied_rows() -> nn.Module:
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    return model


def embedding(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Embedding(8, 8, **options))


REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, tuple[str, ...]]] = {
    "heads": (gpt, None, ("blocks.0.qkv (and 1 more by 'blocks.*.qkv')", "6 heads of keys", "4 ranks", "choose")),
    "heads of keys": (lambda: gpt(heads=8, kv_heads=2), None, ("2 heads of keys", "4 ranks")),
    "width": (lambda: nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8)), {"0": "column", "1": "row"},
              ("0: its 6 features that go out", "1: its 6 features that come in")),
    "names": (Perceptron, {"upp": "column", **DOWN}, ("'upp'", "up", "named_modules")),
    "patterns": (gpt, {"block.*.qkv": "column"}, ("'block.*.qkv'", "blocks.*.qkv")),
    "words": (Perceptron, {"up": "columns", **DOWN}, ("'columns' for up", "vocabulary")),
    "types": (Perceptron, {"up": 3, **DOWN}, ("3 for up", "ParallelStyle")),
    "a norm in columns": (Perceptron, {"norm": "column", **DOWN}, ("norm: a LayerNorm has no columns", '"sequence"')),
    "a norm in rows": (Perceptron, {"norm": "row", **UP}, ("norm: a LayerNorm has no rows",)),
    "a norm of tokens": (Perceptron, {"norm": "vocabulary"}, ("norm: a LayerNorm has no rows of tokens",)),
    "columns alone": (Perceptron, UP, ('up is "column"', "stay cut", '"row"')),
    "rows alone": (Perceptron, DOWN, ('down is "row"', "not be cut", '"column"')),
    "columns alone in one block": (gpt, {"blocks.*.up": "column", "blocks.0.down": "row"},
                                   ('blocks.1.up is "column" and nothing in blocks.1 is "row"',)),
    "twice": (Perceptron, {"u*": "column", "up": "replicate", **DOWN}, ('"column" by \'u*\'', '"replicate" by \'up\'')),
    "tied": (lambda: Own(8), {"tokens": "vocabulary"},
             ("tokens.weight is one parameter with head.weight", "S(0)", "whole", '"vocabulary"')),
    "tied in two ways": (tied_rows, {"0": "vocabulary", "1": "row", "2": "column"},
                         ("0.weight is one parameter with 1.weight", "S(0)", "S(1)")),
    "options of an embedding": (embedding(max_norm=1.0), {"0": "vocabulary"}, ("max_norm=1.0",)),
    "no ready plan": (Perceptron, None, ("no ready plan for Perceptron", "plan=")),
    "parameters unknown": (Counts, None, ("blocks.1.scale", "does not fit Counts")),
    "wrapped": (lambda: nn.DataParallel(Perceptron()), {**UP, **DOWN}, ("wrapped in DataParallel",)),
}


def refused(wire: Any) -> dict[str, str]:
    mesh, said = Mesh(tensor=4), {}
    for case, (build, plan, _) in REFUSED.items():
        model = build()
        before = dict(model.named_parameters(remove_duplicate=False))
        with pytest.raises((ValueError, TypeError)) as caught:
            raise AssertionError(f"{case}: {type(tensor_parallel(model, mesh, plan)).__name__} was divided")
        said[case] = str(caught.value)
        after = dict(model.named_parameters(remove_duplicate=False))
        assert after.keys() == before.keys()
        assert all(after[name] is before[name] and not is_dtensor(p) for name, p in before.items())
        assert all("forward" not in module.__dict__ for module in model.modules())
    silent = {name: style for name, style in PLAN.items() if name not in ("first", "positions")}
    with pytest.raises(ValueError, match=r"nothing of positions\.weight, first\.weight, first\.bias: name") as caught:
        tensor_parallel(Own(8), mesh, silent, sequence=True)
    said["positions untold"] = str(caught.value)
    tensor_parallel(Own(8), mesh, silent)  # where all ranks have all positions a norm's gradient is whole
    tensor_parallel(Own(8), mesh, {**silent, "first": "sequence", "positions": Style()}, sequence=True)
    model = tensor_parallel(Own(8), mesh, PLAN, sequence=True)
    with pytest.raises(ValueError, match="DTensor already"):
        tensor_parallel(model, mesh, PLAN)
    with pytest.raises(ValueError, match="loss='logits'"):
        tensor_parallel(Perceptron(), mesh, {**UP, **DOWN}, loss="logits")
    with pytest.raises(ValueError, match=r"name the dimension .* \"tensor\""):
        tensor_parallel(Perceptron(), init_device_mesh("cpu", (4,), mesh_dim_names=("tp",)), {**UP, **DOWN})
    with pytest.raises(TypeError, match="mesh is a int"):
        tensor_parallel(Perceptron(), 4, {**UP, **DOWN})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at tokens sequences of 6 positions cannot be divided over 4 ranks") as caught:
        model(torch.zeros(2, 6, dtype=torch.long))
    said["positions"] = str(caught.value)
    return said


def test_every_rank_says_the_same_and_changes_nothing() -> None:
    answers = run(refused, 4)
    assert all(answer == answers[0] for answer in answers)
    for case, (_, _, parts) in REFUSED.items():
        print(answers[0][case])
        assert [part for part in parts if part not in answers[0][case]] == [], answers[0][case]


def without(wire: Any) -> None:
    for mesh in (Mesh(data=2), init_device_mesh("cpu", (2,), mesh_dim_names=("data",))):
        model = Perceptron()
        before = list(model.parameters())
        assert tensor_parallel(model, mesh, {"nothing": "column"}) is model
        assert all(p is q for p, q in zip(model.parameters(), before, strict=True))


def test_a_mesh_without_tensor_axis_changes_nothing() -> None:
    run(without, 2)
