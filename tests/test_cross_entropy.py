"""`fasttrain.losses.cross_entropy` as an operation of torch: autograd, compile, autocast, memory, bad input."""

import math
from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from entropy import Numbers, check_grads, check_losses, draw, exact
from helpers import assert_same_bits
from torch import Tensor

from benchmarks import bench_cross_entropy
from benchmarks.allocated import peak
from fasttrain.losses import cross_entropy, cross_entropy_parts

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.usefixtures("one_thread")


def loss_and_grad(loss: Callable[..., Tensor], logits: Tensor, *arguments: object,
                  **options: object) -> tuple[Tensor, Tensor]:
    x = logits.detach().requires_grad_()
    found = loss(x * 1 if options.get("inplace_backward") else x, *arguments, **options)
    (grad,) = torch.autograd.grad(found.sum(), x)
    return found.detach(), grad


# --- A drop-in --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_as_torchs(dtype: torch.dtype, reduction: str) -> None:
    """Shapes, reductions, options; the loss itself in float32."""
    for shape, smoothing, ignore in product([(9,), (6, 9), (0, 9)], (0.0, 0.2), (-100, 2)):
        logits, targets = draw(shape, dtype, 1)
        targets = torch.where(targets == -100, ignore, targets)
        options = dict(label_smoothing=smoothing, ignore_index=ignore, reduction=reduction)
        found, grad = loss_and_grad(cross_entropy, logits, targets, **options)
        wanted, wanted_grad = loss_and_grad(F.cross_entropy, logits.double(), targets, **options)
        assert found.shape == wanted.shape
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6, equal_nan=True)
        assert grad.dtype == dtype
        bound = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps
        torch.testing.assert_close(grad.double(), wanted_grad, rtol=bound, atol=1e-6 if bound > 1e-9 else 1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sixteen_bits_are_better_than_torchs(dtype: torch.dtype) -> None:
    """Logits of 16 bits are computed with in float32."""
    logits, targets = draw((64, 999), dtype, 2, ignored=0.0)
    wanted = exact(logits, targets, Numbers(), torch.tensor([1 / 64]))
    found, grad = loss_and_grad(cross_entropy, logits, targets)
    theirs, their_grad = loss_and_grad(F.cross_entropy, logits, targets)
    mean = wanted.losses.mean()
    assert abs(found - mean) <= max(abs(theirs - mean), 1e-6)
    assert (grad - wanted.grads).abs().max() <= (their_grad - wanted.grads).abs().max() + 2**-20 / 64
    check_grads(grad, wanted)


def test_any_leading_shape() -> None:
    logits, targets = draw((2, 3, 4, 10), torch.float32, 1)
    found, grad = loss_and_grad(cross_entropy, logits, targets, reduction="none")
    flat, flat_grad = loss_and_grad(cross_entropy, logits.view(-1, 10), targets.view(-1), reduction="none")
    assert_same_bits(found.view(-1), flat)
    assert_same_bits(grad.view(-1, 10), flat_grad)


def test_losses_of_rows_weighted() -> None:
    """Every row's derivative has its own factor."""
    logits, targets = draw((30, 70), torch.float32, 1)
    weights = torch.linspace(-1, 3, 30)
    x = logits.requires_grad_()
    (cross_entropy(x, targets, reduction="none", z_loss=1e-3) * weights).sum().backward()
    check_grads(x.grad, exact(logits, targets, Numbers(0.0, 1e-3), weights))


def test_parts() -> None:
    logits, targets = draw((40, 12), torch.float32, 4)
    x = logits.requires_grad_()
    found = cross_entropy_parts(x, targets, label_smoothing=0.1, z_loss=1e-2)
    counted = targets != -100
    wanted = exact(logits, targets, Numbers(0.1), torch.ones(1)).losses
    check_losses(found.rows, wanted)
    torch.testing.assert_close(found.z, torch.where(counted, 1e-2 * logits.detach().logsumexp(1).square(), 0))
    torch.testing.assert_close(found.loss, (found.rows.sum() + found.z.sum()) / found.counted)
    assert int(found.counted) == int(counted.sum())
    assert int(found.correct) == int((counted & (logits.argmax(1) == targets)).sum())
    assert [part.requires_grad for part in found] == [True, False, False, False, False]
    assert_same_bits(found.loss, cross_entropy(x, targets, label_smoothing=0.1, z_loss=1e-2))


def test_all_rows_ignored() -> None:
    logits, targets = torch.randn(3, 5), torch.full((3,), -100)
    for reduction, wanted in (("mean", math.nan), ("sum", 0.0)):
        loss, grad = loss_and_grad(cross_entropy, logits, targets, reduction=reduction)
        assert_same_bits(loss, torch.tensor(wanted))
        assert_same_bits(grad, torch.zeros(3, 5))


# --- Autograd ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction: str) -> None:
    logits, targets = draw((5, 6), torch.float64, 1, scale=1.0)
    function = partial(cross_entropy, label_smoothing=0.1, z_loss=0.05, reduction=reduction)
    assert torch.autograd.gradcheck(lambda x: function(x, targets), logits.requires_grad_())


@pytest.mark.parametrize("inplace", [False, True])
def test_no_second_derivative(inplace: bool) -> None:
    logits, targets = draw((5, 6), torch.float32, 1)
    x = logits.requires_grad_()
    loss = cross_entropy(x * 1, targets, inplace_backward=inplace)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(torch.autograd.grad(loss, x, create_graph=True)[0].sum(), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 33), (2, 3, 5, 33)], ids=str)
def test_in_place_gives_the_same_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    logits, targets = draw(shape, dtype, 1)
    options = dict(label_smoothing=0.1, z_loss=1e-3)
    _, wanted = loss_and_grad(cross_entropy, logits, targets, **options)
    assert_same_bits(loss_and_grad(cross_entropy, logits, targets, inplace_backward=True, **options)[1], wanted)
    x = logits.requires_grad_()
    y = x * 1
    z = y[..., 1:]  # a view of a tensor that is used elsewhere
    (cross_entropy(z, (targets - 1).clamp_min(0), inplace_backward=True)).backward()
    assert_same_bits(y.detach()[..., 1:], x.grad[..., 1:])
    assert bool((x.grad[..., 0] == 0).all())


def test_what_else_needs_the_logits_raises() -> None:
    """Rather than computing something else."""
    logits, targets = draw((5, 6), torch.float32, 1)
    x = logits.requires_grad_()
    capped = torch.tanh(x)  # keeps its result
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cross_entropy(capped, targets, inplace_backward=True).backward()
    loss = cross_entropy(x * 1, targets, inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_twice_with_the_graph_retained() -> None:
    logits, targets = draw((5, 6), torch.float32, 1)
    x = logits.requires_grad_()
    loss = cross_entropy(x, targets)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in "ab")
    assert_same_bits(first, second)


def test_autocast_leaves_it_alone() -> None:
    """Logits of a linear layer in bf16 are read as they are, and the loss is float32: as torch's, without a copy."""
    hidden, weight = torch.randn(5, 8), torch.randn(20, 8, requires_grad=True)
    targets = torch.arange(5)
    with torch.autocast("cpu", torch.bfloat16):
        logits = F.linear(hidden, weight)
        loss, theirs = cross_entropy(logits, targets), F.cross_entropy(logits.float(), targets)
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(loss, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(each, weight, retain_graph=True)[0] for each in (loss, theirs)),
                               rtol=0.02, atol=1e-3)  # gradients of bf16 logits are bf16


# --- torch.compile ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_without_a_break(inplace: bool) -> None:
    torch.compiler.reset()
    hidden, weight = torch.randn(5, 8), torch.randn(20, 8, requires_grad=True)
    targets = torch.arange(5)

    def function(weight: Tensor) -> Tensor:
        return cross_entropy(hidden @ weight.T, targets, label_smoothing=0.1, inplace_backward=inplace)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for run in (compiled(weight), compiled(weight)):
        assert_same_bits(run, function(weight))
        assert_same_bits(*(torch.autograd.grad(loss, weight)[0] for loss in (run, function(weight))))
    torch.compiler.reset()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_operators_are_what_torch_asks_of_them(reduction: str) -> None:
    logits, targets = draw((5, 6), torch.float32, 1)
    torch.library.opcheck(torch.ops.fasttrain.cross_entropy.default,
                          (logits.requires_grad_(), targets, 0.1, 1e-3, -100, reduction, False))


# --- Memory -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", DTYPES)
def test_memory(dtype: torch.dtype) -> None:
    """Forward: 28 bytes a row and a few numbers. Backward: the derivative alone; in place not even that."""
    rows, classes = 64, 5000
    logits, targets = draw((rows, classes), dtype, 1)
    x = logits.requires_grad_()
    few = 28 * rows + 1024
    for inplace in (False, True):
        y = x * 1
        loss = cross_entropy(y, targets, inplace_backward=inplace)
        assert peak(partial(cross_entropy, y, targets)) <= few
        assert peak(partial(torch.autograd.grad, loss, y)) <= few + (not inplace) * logits.nbytes


# --- Bad input --------------------------------------------------------------------------------------------------------

LOGITS, TARGETS = torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize("logits, targets, options, error, words", [
    (LOGITS, TARGETS, {"label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5: it is a share, from 0 to 1"),
    (LOGITS, TARGETS, {"label_smoothing": math.nan}, ValueError, "label_smoothing is nan"),
    (LOGITS, TARGETS, {"z_loss": -1.0}, ValueError, "z_loss is -1.0: the factor of a penalty is not negative"),
    (LOGITS, TARGETS, {"reduction": "avg"}, ValueError, "reduction is 'avg': it is one of mean, sum, none"),
    (LOGITS.long(), TARGETS, {}, TypeError, "logits are int64; cross-entropy takes float32, bfloat16, float"),
    (LOGITS, LOGITS, {}, TypeError, "probabilities are not taken here"),
    (LOGITS, TARGETS.float(), {}, TypeError, "targets are float32: they are indices of classes"),
    (LOGITS, TARGETS.bool(), {}, TypeError, "targets are bool: they are indices of classes"),
    (LOGITS, TARGETS[:3], {}, ValueError, r"logits of shape \(4, 5\), targets of shape \(3,\): there must be one"),
    (torch.zeros(2, 5, 3), torch.zeros(2, 3).long(), {}, ValueError, r"the second in .* give logits.movedim\(1, -1\)"),
    (torch.tensor(1.0), TARGETS, {}, ValueError, "logits have no dimension"),
    (LOGITS, TARGETS.to("meta"), {}, ValueError, "logits are on cpu and targets on meta"),
    (LOGITS, TARGETS + 5, {}, IndexError, "the target of row 0 is 5, and there are 5 classes"),
    (LOGITS.clone().requires_grad_(), TARGETS, {"inplace_backward": True}, ValueError, "logits that are a leaf"),
    ((LOGITS[:1].clone().requires_grad_() * 1).expand(4, 5), TARGETS, {"inplace_backward": True}, ValueError,
     "elements share memory"),
])
def test_bad_input(logits: Tensor, targets: Tensor, options: dict[str, object], error: type[Exception],
                   words: str) -> None:
    with pytest.raises(error, match=words):
        cross_entropy(logits, targets, **options)


def test_benchmark() -> None:
    """At a tiny size: every row is there, and the chunks take less memory."""
    figures = bench_cross_entropy.run(rows=64, rounds=2)
    assert [(row["classes"], row["dtype"]) for row in figures["rows"]] == [(256, "fp32"), (256, "bf16"),
                                                                           (50257, "fp32"), (50257, "bf16")]
    said = bench_cross_entropy.report(figures)
    assert "64 x 50257" in said
    assert said.count(" MB") == 4
