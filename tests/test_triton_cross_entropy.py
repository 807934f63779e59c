"""Cross-entropy's Triton kernels in the interpreter, against torch in float64, and against the CPU's.

The same kernels are compiled ahead in tests/test_cross_entropy_compile.py, and tests/test_gpu_cross_entropy.py runs
them.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from entropy import Numbers, check, draw, measured
from helpers import assert_same_bits, usable
from test_cross_entropy_kernel import INF, NAN, ONE, check_in_place, layouts
from torch import Tensor

from fasttrain.kernels import cross_entropy as kernel
from fasttrain.kernels.cross_entropy import Terms

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore:invalid value:RuntimeWarning:numpy"),
              pytest.mark.skipif(bool(usable("triton")), reason=str(usable("triton")))]
triton_cross_entropy = pytest.importorskip("fasttrain.kernels.triton_cross_entropy")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that rows have several."""
    monkeypatch.setattr(triton_cross_entropy, "BLOCK_INTERPRETED", 64)


@pytest.mark.parametrize("classes, index", [(1, torch.uint8), (2, torch.int64), (63, torch.int32), (64, torch.int64),
                                            (65, torch.uint8), (200, torch.int64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers(dtype: torch.dtype, classes: int, index: torch.dtype) -> None:
    """Odd rows begin anywhere between multiples of 16 bytes."""
    for seed, numbers in enumerate((Numbers(), Numbers(0.1, 1e-3))):
        logits, targets = draw((4, classes), dtype, seed, index=index)
        check(logits, targets, numbers, "triton", (classes, dtype, numbers))


@pytest.mark.parametrize("scale, offset", [(100.0, 0.0), (1e-3, 0.0), (1.0, 1e4), (30.0, -300.0)])
def test_extreme_logits(scale: float, offset: float) -> None:
    logits, targets = draw((3, 150), torch.float32, 1, scale, offset)
    check(logits, targets, Numbers(0.1), "triton")
    rising = torch.stack([torch.linspace(-40, 40, 150), torch.linspace(40, -40, 150)])
    check(rising, torch.tensor([0, 3]), Numbers(0.1, 1e-3), "triton")


ROWS = [[0.0, INF, 1], [0, NAN, 1], [0, -INF, 1], [-INF, 0, 0], [-INF] * 3, [INF] * 3, [-INF, NAN, -INF], [NAN] * 3,
        [INF, -INF, 0], [-INF, -INF, 5], [-3.4028234663852886e38] * 3]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("wide", [3, 70])
def test_special_values_are_torchs(wide: int, smoothing: float) -> None:
    for target in (0, wide - 2, wide - 1):
        logits = torch.tensor([[row[0]] * (wide - 3) + row for row in ROWS])
        targets = torch.full((len(ROWS),), target)
        x = logits.clone().requires_grad_()
        wanted = F.cross_entropy(x, targets, label_smoothing=smoothing, reduction="none")
        (grad,) = torch.autograd.grad(wanted.sum(), x)
        losses, grads = measured(logits, targets, Numbers(smoothing), ONE, "triton")
        finite = 10 if not smoothing else 9  # torch adds up numbers that large one after the other, to infinity
        torch.testing.assert_close(losses[:finite], wanted.detach()[:finite], equal_nan=True)
        torch.testing.assert_close(grads[:finite], grad[:finite], equal_nan=True)


def test_rows_that_are_ignored() -> None:
    logits, targets = torch.full((3, 100), NAN), torch.full((3,), -100)
    losses, grads = measured(logits, targets, Numbers(0.1, 1e-3), ONE, "triton")
    assert_same_bits(losses, torch.zeros(3))
    assert_same_bits(grads, torch.zeros(3, 100))
    assert measured(torch.zeros(0, 5), targets[:0], Numbers(), ONE, "triton")[0].shape == (0,)


def test_targets_that_are_no_class_are_nan() -> None:
    """Nobody waits for a GPU to say so."""
    logits, targets = draw((4, 70), torch.float32, 1, ignored=0.0)
    right = measured(logits, targets, Numbers(), ONE, "triton")
    targets[1], targets[3] = 70, -1
    losses, grads = measured(logits, targets, Numbers(), ONE, "triton")
    for found, wanted in ((losses, right[0]), (grads, right[1])):
        assert bool(found[[1, 3]].isnan().all())
        assert_same_bits(found[[0, 2]], wanted[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(dtype: torch.dtype) -> None:
    for name, logits in layouts(dtype).items():
        some = logits[:2, :2] if logits.dim() > 2 else logits
        targets = draw((*some.shape[:-1], some.shape[-1]), dtype, 2)[1]
        check(some, targets, Numbers(0.1), "triton", name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place(dtype: torch.dtype) -> None:
    whole = draw((3, 3, 150), dtype, 1)[0]
    whole[:, -1], whole[..., 131:] = 7.0, 7.0
    check_in_place(whole[:, :-1, :131], "triton")
    assert bool((whole[:, -1] == 7).all())
    assert bool((whole[..., 131:] == 7).all())


def pieces_of(logits: Tensor, targets: Tensor, backend: str, scales: Tensor,
              smooth: bool = True) -> tuple[Tensor, Tensor]:
    """Losses and derivatives by way of three ranks' parts."""
    cut, classes = [0, 20, 20, 130], logits.shape[1]
    terms = [Terms(first, classes, -100, 0.1 * smooth, 1e-3 * smooth) for first in cut[:3]]
    shards = [logits[:, first:last] for first, last in itertools.pairwise(cut)]
    parts = torch.stack([kernel.measure_part(x, targets, t, backend) for x, t in zip(shards, terms, strict=True)])
    found = kernel.finish(kernel.combine(parts), targets, terms[0])
    grads = [kernel.differentiate(x, targets, t, found.parts, scales, None, backend)
             for x, t in zip(shards, terms, strict=True)]
    return found.losses + found.z, torch.cat(grads, 1)


def test_parts_of_rows() -> None:
    """As tests/test_vocab_parallel_loss.py has them of the CPU."""
    logits, targets = draw((4, 130), torch.float32, 3)
    scales = torch.linspace(0.5, 1, 4)
    found = pieces_of(logits, targets, "triton", scales)
    for one, other in zip(found, pieces_of(logits, targets, "reference", scales), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    whole = measured(logits, targets, Numbers(0.1, 1e-3), scales, "triton")
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("offset", [-INF, 1e4, 0.0])
def test_parts_of_extreme_rows(offset: float) -> None:
    """A shard all of -inf, one around 10,000, and all logits equal: as of the whole."""
    logits, _ = draw((4, 130), torch.float32, 4)
    logits[:, 20:] += offset
    if offset == 0:
        logits.zero_()
    targets, scales, smooth = torch.tensor([0, 3, 19, 7]), torch.ones(4), offset > 0
    for one, other in zip(pieces_of(logits, targets, "triton", scales, smooth),
                          measured(logits, targets, Numbers(0.1 * smooth, 1e-3 * smooth), scales, "reference"),
                          strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_totals() -> None:
    logits, targets = draw((6, 40), torch.float32, 3)
    terms = Terms(0, 40, -100, 0.1, 1e-3)
    found, wanted = kernel.measure(logits, targets, terms, "triton"), kernel.measure(logits, targets, terms)
    assert int(found.counted) == int(wanted.counted)
    assert int(found.correct) == int(wanted.correct)
    torch.testing.assert_close(found.total, wanted.total, rtol=1e-6, atol=0)
