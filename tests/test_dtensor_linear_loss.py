"""A linear layer and its loss in chunks, its classes divided over ranks: equal to float64 torch, in little memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from entropy import Numbers, draw, exact
from helpers import assert_same_bits
from ranks import run
from torch import Tensor

from benchmarks.allocated import peak
from fasttrain.losses import linear_cross_entropy

SMOOTH = Numbers(0.1, 1e-3)
FEATURES = 12
# Where rows are cut (None: every rank has all), the leading shape, classes, rows of a chunk, reduction, a bias.
CASES = [(None, (3, 7), 50, 5, "mean", True), (None, (21,), 5, 21, "none", False), (None, (2, 3, 2), 2, 1, "sum", True),
         (1, (3, 7), 50, 4, "none", True), (1, (3, 8), 51, 100, "mean", False), (0, (5, 2), 49, 3, "sum", True),
         (0, (6,), 50, 7, "mean", True), (1, (2, 3), 1, 2, "none", False)]


def leaves(shape: tuple[int, ...], vocabulary: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """[hidden, weight, bias] and targets."""
    generator = torch.Generator().manual_seed(vocabulary)
    made = [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
            for size in ((*shape, FEATURES), (vocabulary, FEATURES), (vocabulary,))]
    return made, draw((*shape, vocabulary), dtype, 1)[1]


def divided(wire: Any, dtype: torch.dtype) -> list[Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (wire.size,), mesh_dim_names=("tensor",))
    found = []
    for number, (dim, shape, vocabulary, chunk, reduction, biased) in enumerate(CASES):
        (hidden, *layer), targets = leaves(shape, vocabulary, dtype)
        layer = [distribute_tensor(each, mesh, [Shard(0)]).requires_grad_() for each in layer[: 1 + biased]]
        if dim is not None or number % 2:
            hidden = distribute_tensor(hidden, mesh, [Replicate() if dim is None else Shard(dim)])
        hidden.requires_grad_()
        loss = linear_cross_entropy(hidden, layer[0], targets, *layer[1:], chunk=chunk, reduction=reduction,
                                    label_smoothing=SMOOTH.label_smoothing, z_loss=SMOOTH.z_loss)
        assert type(loss) is Tensor
        (loss * torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)).sum().backward()
        for each in (hidden, *layer):
            assert getattr(each.grad, "placements", None) == getattr(each, "placements", None)
        found.append([loss.detach()] + [each.grad.full_tensor() if hasattr(each, "placements") else each.grad
                                        for each in (hidden, *layer)])
    return found


# In bfloat16 logits of 10 are off by up to 0.03, and derivatives of two ranks are rounded before their sum.
@pytest.mark.parametrize("ranks, dtype, bound", [
    (2, torch.float64, 1e-11), (4, torch.float64, 1e-11), (2, torch.float32, 5e-6), (2, torch.bfloat16, 0.03)])
def test_against_one_process(ranks: int, dtype: torch.dtype, bound: float) -> None:
    answers = run(divided, ranks, dtype)
    for case, found in zip(CASES, answers[0], strict=True):
        _, shape, vocabulary, _, reduction, biased = case
        (hidden, weight, bias), targets = leaves(shape, vocabulary, dtype)
        wide = [each.double().requires_grad_() for each in (hidden, weight, bias)[: 2 + biased]]
        logits = F.linear(*wide)
        rows = exact(logits, targets, SMOOTH, torch.ones(1)).losses
        scale = torch.linspace(0.5, 2, rows.numel(), dtype=torch.float64).view(rows.shape) if reduction == "none" else (
            torch.full(rows.shape, 0.5, dtype=torch.float64) / ((targets != -100).sum() if reduction == "mean" else 1))
        wanted = torch.autograd.grad(logits, wide, exact(logits, targets, SMOOTH, scale).grads)
        loss = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / (targets != -100).sum()}[reduction]
        for one, other in zip(found, (loss, *wanted), strict=True):
            assert one.dtype == dtype or (one is found[0] and one.dtype == torch.float32)
            error = (one.double() - other).abs().max() if one.numel() else 0.0
            assert error <= bound * max(1.0, float(other.abs().max())), case
        for answer in answers[1:]:
            assert_same_bits(answer[CASES.index(case)][0], found[0], str(case))


# --- What is sent -----------------------------------------------------------------------------------------------------

def sent(wire: Any) -> list[Any]:
    """Collectives and bytes through a wire, and the collectives of the mesh's own group."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (wire.size,))
    (hidden, weight, _), targets = leaves((4, 8), 50, torch.float32)
    weight = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    found = []
    for cut in (False, True):
        for given in (wire, None):
            x = distribute_tensor(hidden, mesh, [Shard(1)]) if cut else hidden
            x = x.detach().requires_grad_()
            before = wire.calls.copy(), wire.bytes.copy()
            with CommDebugMode() as counted:
                linear_cross_entropy(x, weight, targets, chunk=8, wire=given).backward()
            found.append((dict(wire.calls - before[0]), dict(wire.bytes - before[1]) if given else
                          sum(counted.get_comm_counts().values())))
    return found


def test_collectives_and_bytes() -> None:
    for answers in run(sent, 2):
        gathers = {"all_gather": 4}  # chunks of 8 of the 32 rows
        assert answers[0] == ({**gathers, "all_reduce": 1}, {"all_gather": 32 * 20, "all_reduce": 32 * FEATURES * 4})
        assert answers[1] == ({}, 4 + 1)
        half = 32 * FEATURES * 4 // 2
        assert answers[2] == ({"all_gather": 4 + 4, "reduce_scatter": 4},
                              {"all_gather": 32 * 20 + half, "reduce_scatter": half})
        assert answers[3] == ({}, 4 + 4 + 4)


# --- Memory -----------------------------------------------------------------------------------------------------------

def highest(wire: Any, reduction: str, cut: bool) -> tuple[int, int]:
    """Peak of a step in chunks, and of the plain one with vocabulary-parallel logits."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from fasttrain.losses import cross_entropy

    mesh = init_device_mesh("cpu", (wire.size,))
    hidden, weight = torch.randn(1024, 32), distribute_tensor(torch.randn(3000, 32), mesh, [Shard(0)]).requires_grad_()
    x = (distribute_tensor(hidden, mesh, [Shard(0)]) if cut else hidden).requires_grad_()
    targets = torch.randint(0, 3000, (1024,))

    def step() -> None:
        linear_cross_entropy(x, weight, targets, chunk=64, reduction=reduction).sum().backward()

    def plain() -> None:
        from torch.distributed.tensor import DTensor, Replicate

        whole = x.redistribute(mesh, [Replicate()]) if cut else DTensor.from_local(x, mesh, [Replicate()])
        cross_entropy(whole @ weight.t(), targets, reduction=reduction, inplace_backward=True).sum().backward()

    step(), plain()
    x.grad = weight.grad = None
    found = peak(step)
    x.grad = weight.grad = None
    return found, peak(plain)


@pytest.mark.parametrize("reduction, cut", [("mean", False), ("mean", True), ("none", True)])
def test_memory(reduction: str, cut: bool) -> None:
    """The logits of a chunk, and the derivatives, twice while backward multiplies them: never this rank's logits."""
    for found, plain in run(highest, 2, reduction, cut):
        logits = 1024 * 1500 * 4
        grads = (1024 // (1 + cut) + 1500) * 32 * 4
        few = 100 * 1024 + 4 * 64 * 32 * 4
        assert found <= 64 * 1500 * 4 + 2 * grads + few
        assert found <= plain / 4
        assert plain >= logits


def refused(wire: Any) -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (wire.size,))
    (hidden, weight, bias), targets = leaves((4, 2), 6, torch.float32)
    rows = distribute_tensor(weight, mesh, [Shard(0)])

    def placed(tensor: Tensor, placement: Any) -> Any:
        return distribute_tensor(tensor, mesh, [Replicate()]).redistribute(mesh, [placement])

    calls = [lambda: linear_cross_entropy(placed(hidden, Shard(2)), rows, targets),
             lambda: linear_cross_entropy(DTensor.from_local(hidden, mesh, [Partial()]), rows, targets),
             lambda: linear_cross_entropy(hidden, placed(weight, Shard(1)), targets),
             lambda: linear_cross_entropy(placed(hidden, Shard(0)), placed(weight, Replicate()), targets),
             lambda: linear_cross_entropy(hidden, rows, targets, bias),
             lambda: linear_cross_entropy(hidden[:, :1], rows, targets),
             lambda: linear_cross_entropy(hidden, rows, targets + 6),
             lambda: linear_cross_entropy(hidden, weight, targets, wire=wire)]
    found = []
    for call in calls:
        with pytest.raises((ValueError, TypeError, IndexError)) as error:
            call()
        found.append(str(error.value))
    return found


def test_refused() -> None:
    rows = "hidden is Replicate, or Shard of any but its last dimension over the ranks that divide the classes"
    words = [rows, rows, "its classes, dimension 0, may be divided over one dimension of the mesh", rows,
             "the bias has one number for each class", "there must be one target for each row", "there are 6 classes",
             "a wire is for a weight cut by classes"]
    for said in run(refused, 2):
        for text, word in zip(said, words, strict=True):
            assert word in text
