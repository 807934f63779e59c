"""Cross-entropy of logits that are a DTensor cut by classes: float64 torch, one collective, placed derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from entropy import Numbers, check_grads, check_losses, draw, exact
from helpers import assert_same_bits
from ranks import run
from torch import Tensor

from benchmarks.allocated import peak
from fasttrain.losses import cross_entropy, cross_entropy_parts, linear_cross_entropy

SMOOTH = Numbers(0.1, 1e-3)
# Even shards, uneven ones, empty ones at the end, a single class.
VOCABULARIES = (1000, 997, 5, 2, 1)


def cut(logits: Tensor, dim: int = -1) -> Any:
    """The logits, cut over all ranks along a dimension; a leaf."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tensor",))
    return distribute_tensor(logits, mesh, [Shard(dim)]).requires_grad_()


def case(vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return draw((3, 7, vocabulary), dtype, vocabulary)


def parallel(wire: Any, dtypes: list[torch.dtype]) -> dict[Any, Any]:
    from torch.distributed.tensor.debug import CommDebugMode

    found = {}
    for vocabulary in VOCABULARIES:
        for dtype in dtypes:
            for numbers in (Numbers(), SMOOTH):
                logits, targets = case(vocabulary, dtype)
                x = cut(logits)
                with CommDebugMode() as counted:
                    parts = cross_entropy_parts(x, targets, label_smoothing=numbers.label_smoothing,
                                                z_loss=numbers.z_loss, reduction="none")
                    parts.loss.sum().backward()
                assert type(parts.loss) is Tensor
                assert (x.grad.placements, x.grad.shape) == (x.placements, x.shape)
                assert counted.get_total_counts() == 1, counted.get_comm_counts()
                found[vocabulary, dtype, numbers] = ([each.detach() for each in parts], x.grad.full_tensor())
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_against_one_process(ranks: int) -> None:
    answers = run(parallel, ranks, [torch.float32, torch.bfloat16, torch.float64])
    for (vocabulary, dtype, numbers), (parts, grad) in answers[0].items():
        what = vocabulary, dtype, numbers
        logits, targets = case(vocabulary, dtype)
        wanted = exact(logits, targets, numbers, torch.ones(1))
        if dtype == torch.float64:
            torch.testing.assert_close(parts[0], wanted.losses, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(grad, wanted.grads, rtol=1e-10, atol=1e-12)
        else:
            check_losses(parts[0], wanted.losses, what)
            check_grads(grad, wanted, what)
        whole = cross_entropy_parts(logits, targets, label_smoothing=numbers.label_smoothing, z_loss=numbers.z_loss)
        assert (int(parts[3]), int(parts[4])) == (int(whole.counted), int(whole.correct)), what
        torch.testing.assert_close(parts[1] + parts[2], parts[0], rtol=1e-6, atol=0)
        for answer in answers[1:]:
            for one, other in zip(answer[what][0], parts, strict=True):
                assert_same_bits(one, other, str(what))


# --- Options, values, and what stands around the loss -----------------------------------------------------------------

VALUES = {"extreme": (draw((6, 9), torch.float32, 2, scale=30.0, offset=1e4)[0], 0.1),
          "all equal": (torch.full((6, 9), 3.0), 0.1),
          "columns that cannot be": (
              draw((6, 9), torch.float32, 3)[0].index_fill(1, torch.tensor([1, 3, 4]), -torch.inf), 0.0)}
TARGETS = torch.tensor([0, 8, -100, 5, 2, 6])


def values(wire: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (logits, smoothing) in VALUES.items():
        x = cut(logits)
        loss = cross_entropy(x, TARGETS, label_smoothing=smoothing, reduction="none", wire=wire)
        loss.sum().backward()
        found[name] = loss.detach(), x.grad.full_tensor()
    found["wire"] = dict(wire.calls)
    logits = VALUES["extreme"][0]
    for reduction in ("mean", "sum"):
        for inplace in (False, True):
            x = cut(logits)
            loss = cross_entropy(x * 1, TARGETS, reduction=reduction, inplace_backward=inplace)
            loss.backward()
            found[reduction, inplace] = loss.detach(), x.grad.full_tensor()
    x = cut(logits)
    loss = cross_entropy(x, torch.full_like(TARGETS, -100))
    loss.backward()
    found["ignored"] = loss.detach(), x.grad.full_tensor()
    return found


def test_values_and_options() -> None:
    one, other = run(values, 2)
    for name, (logits, smoothing) in VALUES.items():
        wanted = exact(logits, TARGETS, Numbers(smoothing), torch.ones(1))
        check_losses(one[name][0], wanted.losses, name)
        check_grads(one[name][1], wanted, name)
    assert one["wire"] == {"all_gather": 3}
    for reduction in ("mean", "sum"):
        x = VALUES["extreme"][0].clone().requires_grad_()
        loss = cross_entropy(x, TARGETS, reduction=reduction)
        loss.backward()
        torch.testing.assert_close(one[reduction, False], (loss.detach(), x.grad), rtol=1e-5, atol=1e-7)
        assert_same_bits(one[reduction, True][1], one[reduction, False][1])
        assert_same_bits(one[reduction, True][0], other[reduction, True][0])
    assert one["ignored"][0].isnan()
    assert_same_bits(one["ignored"][1], torch.zeros(6, 9))


def surrounded(wire: Any) -> None:
    """A column-parallel head by `parallelize_module`: the derivative goes on through it, once."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (wire.size,))
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 10)).double()
    inputs, targets = torch.randn(5, 6).double(), torch.randint(0, 10, (5,))
    wanted = torch.nn.functional.cross_entropy(model(inputs), targets)
    grads = torch.autograd.grad(wanted, list(model.parameters()))
    parallelize_module(model, mesh, {"1": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)})
    loss = cross_entropy(model(inputs), distribute_tensor(targets, mesh, [Replicate()]), inplace_backward=True)
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    for (name, p), grad in zip(model.named_parameters(), grads, strict=True):
        found = p.grad.full_tensor() if hasattr(p.grad, "placements") else p.grad
        torch.testing.assert_close(found, grad, rtol=1e-10, atol=1e-12, msg=name)
    copies = distribute_tensor(torch.randn(4, 10), mesh, [Replicate()]).requires_grad_()
    cross_entropy(copies, targets[:4]).backward()
    x = copies.detach().to_local().requires_grad_()
    cross_entropy(x, targets[:4]).backward()
    assert copies.grad.placements == (Replicate(),)
    assert_same_bits(copies.grad.to_local(), x.grad)


def test_through_a_column_parallel_head() -> None:
    run(surrounded, 2)


def highest(wire: Any) -> tuple[int, int, int]:
    """The most memory of forward and backward beside the logits: ours, ours in place, torch's."""
    from torch.distributed.tensor.parallel import loss_parallel

    x, targets = cut(torch.randn(64, 3000)), torch.arange(64)

    def ours() -> None:
        torch.autograd.grad(cross_entropy(x, targets), x)

    def in_place() -> None:
        torch.autograd.grad(cross_entropy(x.clone(), targets, inplace_backward=True), x)

    def theirs() -> None:
        with loss_parallel():
            torch.autograd.grad(torch.nn.functional.cross_entropy(x, targets), x)

    for call in (ours, in_place, theirs):
        call()
    return peak(ours), peak(in_place), peak(theirs)


def test_memory() -> None:
    """A derivative, and no more than some numbers for each row; in place not even that (a copy of the logits here)."""
    for ours, in_place, theirs in run(highest, 2):
        logits, few = 64 * 1500 * 4, 64 * 2000
        assert logits <= ours <= logits + few
        assert in_place <= logits + few
        assert theirs >= 3.9 * logits


def refused(wire: Any) -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (wire.size,))
    targets = torch.zeros(4, dtype=torch.int64)
    short = torch.zeros(4, 3 - wire.rank)
    calls = [lambda: cross_entropy(cut(torch.zeros(4, 6), 0), targets),
             lambda: cross_entropy(cut(torch.zeros(4, 6)), distribute_tensor(targets, mesh, [Shard(0)])),
             lambda: cross_entropy(DTensor.from_local(short[:, :1], mesh, [Shard(1)], shape=(4, 6), stride=(6, 1)),
                                   targets),
             lambda: cross_entropy(cut(torch.zeros(4, 6)), targets + 6),
             lambda: cross_entropy(cut(torch.zeros(4, 6)), targets, inplace_backward=True),
             lambda: cross_entropy(torch.zeros(4, 6), targets, wire=wire),
             lambda: linear_cross_entropy(cut(torch.zeros(4, 6)), torch.zeros(3, 6), targets)]
    found = []
    for call in calls:
        with pytest.raises((ValueError, TypeError, IndexError)) as error:
            call()
        found.append(str(error.value))
    return found


def test_refused() -> None:
    words = ["its classes, dimension 1, may be divided over one dimension of the mesh",
             "every rank needs all of them here, targets.full_tensor()",
             "and (Shard(dim=1),) puts 3 there: make the DTensor with its true shape",
             "the target of row 0 is 6, and there are 6 classes", "logits that are a leaf",
             "a wire is for logits cut by classes", ""]
    for said in run(refused, 2):
        for text, word in zip(said, words, strict=True):
            assert word in text
