"""A linear layer and its loss in chunks: equal to the plain form, in memory that does not hold the logits."""

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from entropy import draw
from helpers import assert_same_bits
from torch import Tensor

from benchmarks.allocated import peak
from fasttrain.losses import cross_entropy, linear_cross_entropy

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS, FEATURES, CLASSES = 37, 24, 150


def leaves(dtype: torch.dtype, *, biased: bool = True) -> tuple[list[Tensor], Tensor]:
    """[hidden, weight, bias] and targets."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(ROWS, FEATURES), (CLASSES, FEATURES), (CLASSES,)][: 2 + biased]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    return made, draw((ROWS, CLASSES), dtype, 1)[1]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    return cross_entropy(F.linear(hidden, weight, bias), targets, **options)


def gradients(loss: Tensor, tensors: list[Tensor], factor: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, tensors, factor)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_plain_form(dtype: torch.dtype, reduction: str) -> None:
    """Sums over chunks come in another order: some units of the last place of the largest term."""
    bound = 1e-12 if dtype == torch.float64 else 2e-6
    for chunk, biased, (smoothing, z) in product((1, 8, ROWS, 100), (True, False), ((0.0, 0.0), (0.1, 1e-2))):
        (hidden, weight, *bias), targets = leaves(dtype, biased=biased)
        options = dict(label_smoothing=smoothing, z_loss=z, reduction=reduction)
        found = linear_cross_entropy(hidden, weight, targets, *bias, chunk=chunk, **options)
        wanted = plain(hidden, weight, targets, *bias, **options)
        factor = torch.randn(found.shape, dtype=dtype)
        for one, other in zip(gradients(found, [hidden, weight, *bias], factor),
                              gradients(wanted, [hidden, weight, *bias], factor), strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=bound, atol=bound * float(other.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    """Logits are rounded as by a linear layer; the derivative by the weight is added up in float32."""
    (hidden, weight, bias), targets = leaves(dtype)
    wide = [each.detach().double().requires_grad_() for each in (hidden, weight, bias)]
    found = linear_cross_entropy(hidden, weight, targets, bias, chunk=1)
    wanted = plain(wide[0], wide[1], targets, wide[2])
    eps = torch.finfo(dtype).eps
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=20 * eps, atol=0)  # logits of 20 are off by 10 eps
    for one, other in zip(torch.autograd.grad(found, (hidden, weight, bias)), torch.autograd.grad(wanted, wide),
                          strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() <= 8 * eps * other.norm()


def test_only_what_is_needed() -> None:
    (hidden, weight, bias), targets = leaves(torch.float32)
    for frozen in range(3):
        tensors = [each.detach().requires_grad_(index != frozen) for index, each in enumerate((hidden, weight, bias))]
        linear_cross_entropy(tensors[0], tensors[1], targets, tensors[2], chunk=10).backward()
        assert [each.grad is None for each in tensors] == [index == frozen for index in range(3)]
    with torch.no_grad():
        assert_same_bits(linear_cross_entropy(hidden, weight, targets, bias, chunk=10),
                         linear_cross_entropy(hidden.detach(), weight, targets, bias, chunk=10))


def test_shapes() -> None:
    (hidden, weight, bias), targets = leaves(torch.float32)
    for rows in (36, 1, 0):
        h, t = hidden[:rows].detach(), targets[:rows]
        flat = linear_cross_entropy(h, weight, t, bias, reduction="none")
        if rows == 36:
            assert_same_bits(linear_cross_entropy(h.view(3, 12, -1), weight, t.view(3, 12), bias, reduction="none"),
                             flat.view(3, 12))
        x = h.requires_grad_()
        linear_cross_entropy(x, weight, t, bias, reduction="sum").backward()
        assert x.grad.shape == h.shape
    ignored = linear_cross_entropy(hidden, weight, torch.full((ROWS,), -100), bias)
    assert ignored.isnan()
    assert all(bool((grad == 0).all()) for grad in torch.autograd.grad(ignored, (hidden, weight, bias)))


def test_rows_that_are_not_contiguous() -> None:
    (hidden, weight, _), targets = leaves(torch.float32)
    apart = hidden.detach().t().contiguous().t()
    assert_same_bits(linear_cross_entropy(apart, weight, targets), linear_cross_entropy(hidden, weight, targets))
    wide = weight.detach().t().contiguous().t().requires_grad_()
    found = [torch.autograd.grad(linear_cross_entropy(hidden, each, targets, chunk=5), each)[0]
             for each in (wide, weight)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_autocast() -> None:
    """As of a linear layer: matrices in bf16, gradients in the parameters' own dtype."""
    (hidden, weight, bias), targets = leaves(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, wanted = (each(hidden, weight, targets, bias) for each in (linear_cross_entropy, plain))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    for one, other in zip(torch.autograd.grad(loss, (hidden, weight, bias)),
                          torch.autograd.grad(wanted, (hidden, weight, bias)), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.05, atol=1e-3)  # bf16


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_break(reduction: str) -> None:
    torch.compiler.reset()
    (hidden, weight, bias), targets = leaves(torch.float32)
    function = partial(linear_cross_entropy, chunk=8, reduction=reduction)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for one, other in zip(*(torch.autograd.grad(each(hidden, weight, targets, bias).sum(), (hidden, weight, bias))
                            for each in (compiled, function)), strict=True):
        assert_same_bits(one, other)
    torch.compiler.reset()


def test_no_second_derivative() -> None:
    (hidden, weight, bias), targets = leaves(torch.float32)
    loss = linear_cross_entropy(hidden, weight, targets, bias, reduction="none").sum()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(grad.sum(), weight)


# --- Memory -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory(dtype: torch.dtype, reduction: str) -> None:
    """The logits of a chunk, the derivatives, and of 16 bits the float32 sum beside one product: never the logits."""
    rows, features, classes, chunk = 2048, 32, 3000, 64
    hidden, weight = torch.randn(rows, features).to(dtype), torch.randn(classes, features).to(dtype)
    targets = torch.randint(0, classes, (rows,))
    hidden.requires_grad_(), weight.requires_grad_()

    def step(loss: Any) -> None:
        loss(hidden, weight, targets, reduction=reduction).sum().backward()

    size, few = dtype.itemsize, 100 * rows
    sums = classes * features * (4 if dtype == torch.float32 else 4 + 2)
    grads = (rows + classes) * features * size
    most = chunk * classes * size + 2 * grads + sums + few
    assert most < rows * classes * size / 4
    step(partial(linear_cross_entropy, chunk=chunk))
    assert peak(partial(step, partial(linear_cross_entropy, chunk=chunk))) <= most
    assert peak(partial(step, plain)) >= 2 * rows * classes * size


# --- Bad input --------------------------------------------------------------------------------------------------------

HIDDEN, WEIGHT, TARGETS = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize("arguments, options, error, words", [
    ((HIDDEN, WEIGHT, TARGETS), {"chunk": 0}, ValueError, "chunk is 0: it is a number of rows, 1 or more"),
    ((HIDDEN, WEIGHT.T, TARGETS), {}, ValueError, r"and weight of shape \(3, 5\): a weight is"),
    ((HIDDEN, WEIGHT.double(), TARGETS), {}, TypeError, "hidden is float32 on cpu, weight float64 on cpu"),
    ((HIDDEN, WEIGHT, TARGETS, torch.zeros(4)), {}, ValueError, "the bias has one number for each class"),
    ((HIDDEN, WEIGHT, TARGETS[:3]), {}, ValueError, "there must be one target for each row"),
    ((HIDDEN, WEIGHT, torch.tensor([0, 0, 0, 5])), {"chunk": 2}, IndexError, "the target of row 3 is 5, and there"),
    ((HIDDEN, WEIGHT, TARGETS), {"reduction": "max"}, ValueError, "reduction is 'max'"),
])
def test_bad_input(arguments: tuple[Tensor, ...], options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        linear_cross_entropy(*arguments, **options)
