"""Pass A: the same bits as the eager tree, for every storage, layout, thread count and instruction set."""

import math

import numpy as np
import pytest
import torch
from helpers import LAYOUTS, REALS, assert_same_bits, generator, make, needs_native, normal, specials
from invariance import check_instruction_sets
from torch import Tensor
from torch.nn import Parameter

from fasttrain.kernels import norm
from fasttrain.optim import SGD

SIZES = (0, 1, 15, 16, 17, 511, 512, 513, 4095, 4096, 4097, 5 * 4096 + 3, 65_535, 65_536, 65_537, 200_003)


def check(tensors: list[Tensor], what: str = "") -> None:
    """Native against eager: every bit; and against another order of summation: close, so that the tree is a sum."""
    sums, nonfinite = norm.squares(tensors)
    wanted, wanted_nonfinite = norm.reference(tensors)
    assert_same_bits(sums, wanted, what)
    assert bool(nonfinite) == bool(wanted_nonfinite), what
    assert sums.dtype == torch.float64
    assert nonfinite.dtype == torch.bool
    for tensor, got in zip(tensors, sums, strict=True):
        flat = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor.detach()
        exact = math.fsum(flat.double().flatten().square().tolist()) if tensor.isfinite().all() else math.nan
        # Each of at most 4096/16 + 4 + log2(blocks) roundings on the way to a sum of positive numbers, 2^-53 each.
        assert math.isnan(exact) or got.item() == exact or abs(got.item() - exact) <= 300 * 2**-53 * exact, what


@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_sizes(dtype: torch.dtype) -> None:
    numbers = generator(1)
    check([normal((size,), dtype, numbers) for size in SIZES])


@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_layouts(dtype: torch.dtype) -> None:
    numbers = generator(2)
    for layout in LAYOUTS:
        check([make(layout, lambda size: normal(size, dtype, numbers)).view], layout)
    expanded = normal((1, 7), dtype, numbers).expand(5, 7)
    check([expanded, torch._neg_view(normal((33,), dtype, numbers)), Parameter(normal((3,), dtype, numbers))])


def test_a_dense_tensor_is_added_in_the_order_of_memory() -> None:
    flat = normal((120 * 99,), torch.float32, generator(3))
    wanted = norm.squares([flat])[0]
    assert_same_bits(norm.squares([flat.view(120, 99).T])[0], wanted)
    assert_same_bits(norm.squares([flat.view(2, 60, 9, 11).permute(0, 3, 1, 2)])[0], wanted)


@pytest.mark.parametrize("kind", [torch.complex64, torch.complex128], ids=str)
def test_complex_numbers_are_pairs(kind: torch.dtype) -> None:
    numbers = generator(4)
    value = torch.complex(*(normal((37, 5), torch.float64, numbers) for _ in "ab")).to(kind)
    check([value, value.conj(), value.conj().imag, value[::2]])
    assert_same_bits(norm.squares([value])[0], norm.squares([torch.view_as_real(value)])[0])


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_matter(threads: int) -> None:
    numbers = generator(5)
    tensors = [normal((size,), torch.float32, numbers) for size in (3, 300_000, 0, 70_000, *range(100), 65_536 * 3)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sums, _ = norm.squares(tensors)
    finally:
        torch.set_num_threads(before)
    assert_same_bits(sums, norm.reference(tensors)[0])
    assert_same_bits(norm.total(sums), norm.total(norm.reference(tensors)[0]))


CODE = """
import torch
from fasttrain.kernels import native, norm
numbers = torch.Generator().manual_seed(6)
values = [torch.randn(70_001, generator=numbers, dtype=torch.float64).to(d)
          for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16)]
sums, nonfinite = norm.squares(values)
assert torch.equal(sums, norm.reference(values)[0]) and not nonfinite
for value in values:
    value[69_999] = float("inf")
    assert norm.squares([value])[1]
print(native.module().isa(), [x.hex() for x in sums.tolist()])
"""


@needs_native
def test_instruction_sets_do_not_matter() -> None:
    check_instruction_sets(CODE)


@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_the_flag_comes_from_the_elements(dtype: torch.dtype) -> None:
    """Every special value at every place of a vector, and in the tail; large finite numbers raise no flag."""
    for value in specials(dtype):
        for place in (0, 15, 16, 37, 515):
            tensor = torch.ones(516, dtype=dtype)
            tensor[place] = value
            assert bool(norm.squares([tensor])[1]) == (not math.isfinite(value)), (value, place)
            check([tensor])
    largest = torch.full((100_000,), torch.finfo(dtype).max, dtype=dtype)
    sums, nonfinite = norm.squares([largest])
    assert not nonfinite
    assert bool(sums.isfinite().all()) == (dtype != torch.float64)  # 1e616: only fp64 overflows, and raises no flag


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    check([every[every.isfinite()], every])
    assert [bool(norm.squares([x])[1]) for x in every.reshape(-1, 16)] == \
           (~every.isfinite()).reshape(-1, 16).any(1).tolist()


def test_the_norm_of_ones_counts_elements() -> None:
    sizes = (5, 0, 4096, 70_000)
    sums, _ = norm.squares([torch.ones(size) for size in sizes])
    assert sums.tolist() == list(map(float, sizes))
    assert norm.total(sums).item() == sum(sizes)
    assert norm.total(torch.zeros(0, dtype=torch.float64)).item() == 0.0
    nothing, flag = norm.squares([])
    assert nothing.shape == (0,)
    assert not flag


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match=r"torch\.int64; it takes float32"):
        norm.squares([torch.ones(3, dtype=torch.int64)])


@needs_native
def test_a_plan_sums_the_gradients_that_it_knows() -> None:
    numbers = generator(7)
    params = [Parameter(normal((size,), torch.float32, numbers)) for size in (5, 70_000, 0, 33)]
    optimizer = SGD(params, lr=0.1)
    for p in params:
        p.grad = normal(p.shape, torch.float32, numbers)
    optimizer.step()
    params[3].grad = None
    plan = optimizer._plan
    assert plan.scan(optimizer.state, [params]) == []
    sums, nonfinite = plan.squares(2)
    assert isinstance(sums, np.ndarray)
    assert_same_bits(torch.from_numpy(sums), norm.squares([p.grad for p in params[:3]])[0])
    assert nonfinite is False
    params[1].grad[69_999] = math.nan
    assert plan.scan(optimizer.state, [params]) == []
    assert plan.squares(1)[1] is True
    plan.release()
