"""Cross-entropy by the backends of the CPU, against torch in float64: numbers, layouts, special values, bits."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from entropy import Numbers, check, draw, exact, measured
from helpers import assert_same_bits, needs_native
from invariance import check_instruction_sets
from torch import Tensor

from fasttrain.kernels import cross_entropy as kernel
from fasttrain.kernels.cross_entropy import Terms, rows_of

CLASSES = (1, 2, 3, 31, 32, 33, 255, 256, 1000, 1023, 1024, 1025, 2048, 5003)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUMBERS = (Numbers(), Numbers(0.1), Numbers(0.0, 1e-3), Numbers(0.3, 1e-2), Numbers(1.0))
ONE = torch.ones(1)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("classes", CLASSES)
def test_numbers(classes: int, backend: str) -> None:
    for seed, (dtype, numbers) in enumerate(product(DTYPES, NUMBERS)):
        index = (torch.int64, torch.int32, torch.uint8)[seed % 3 if classes <= 256 else seed % 2]
        logits, targets = draw((11, classes), dtype, seed, index=index)
        check(logits, targets, numbers, backend, (classes, dtype, numbers, seed))


@pytest.mark.parametrize("scale, offset", [(100.0, 0.0), (1e-3, 0.0), (1.0, 1e4), (1.0, -3e4), (30.0, 300.0)])
def test_extreme_logits(scale: float, offset: float, backend: str) -> None:
    for dtype, numbers in product(DTYPES, NUMBERS[:3]):
        logits, targets = draw((9, 3000), dtype, 1, scale, offset)
        if numbers.z_loss and abs(offset) >= 1e4:
            continue  # 1e5 and more: a bound in units of the cross-entropy says nothing
        check(logits, targets, numbers, backend, (scale, offset, dtype, numbers))


def test_maxima_that_rise_and_fall(backend: str) -> None:
    """Every block of a row has another maximum."""
    x = torch.linspace(-40, 40, 6000)
    logits = torch.stack([x, x.flip(0), x.abs(), -x.abs(), x * 0])
    check(logits, torch.tensor([0, 5999, 3000, 1, 7]), Numbers(0.1, 1e-3), backend)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_quarter_of_a_million_classes(dtype: torch.dtype, backend: str) -> None:
    logits, targets = draw((5, 256 * 1024 + 1), dtype, 1)
    check(logits, targets, Numbers(0.1, 1e-4), backend)


# --- What is not finite -----------------------------------------------------------------------------------------------

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("row", [[0, INF, 1], [0, NAN, 1], [0, -INF, 1], [-INF, 0, 0], [-INF] * 3, [INF] * 3,
                                 [-INF, NAN, -INF], [NAN] * 3, [INF, -INF, 0], [-INF, -INF, 5]], ids=str)
@pytest.mark.parametrize("wide", [3, 2000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_special_values_are_torchs(row: list[float], wide: int, smoothing: float, backend: str) -> None:
    """Wherever they stand in a row; loss and derivative."""
    logits = torch.cat([torch.full((wide - 3,), row[0]), torch.tensor(row)])[None] if wide > 3 else torch.tensor([row])
    for target in (0, wide - 2, wide - 1):
        targets = torch.tensor([target])
        x = logits.clone().requires_grad_()
        wanted = F.cross_entropy(x, targets, label_smoothing=smoothing)
        wanted.backward()
        losses, grads = measured(logits, targets, Numbers(smoothing), ONE, backend)
        torch.testing.assert_close(losses[0], wanted.detach(), equal_nan=True)
        torch.testing.assert_close(grads, x.grad, equal_nan=True)


def test_rows_that_are_ignored(backend: str) -> None:
    """Their losses and derivatives are zero, whatever their logits are."""
    logits, targets = torch.full((4, 100), NAN), torch.full((4,), -100)
    losses, grads = measured(logits, targets, Numbers(0.1, 1e-3), ONE, backend)
    assert_same_bits(losses, torch.zeros(4))
    assert_same_bits(grads, torch.zeros(4, 100))
    found = kernel.measure(logits, targets, Terms(0, 100, -100, 0.0, 0.0), backend)
    assert (float(found.total), int(found.counted), int(found.correct)) == (0.0, 0, 0)
    targets[1] = 3
    wanted = torch.zeros(4, 100)
    wanted[1] = NAN
    assert_same_bits(measured(logits, targets, Numbers(), ONE, backend)[1], wanted)


def test_another_ignored_target(backend: str) -> None:
    logits, targets = draw((20, 5), torch.float32, 1, ignored=0.0)
    check(logits, targets, Numbers(0.1, 0.0, 3), backend)


@pytest.mark.parametrize("shape", [(0, 7), (3, 0, 7), (0, 2, 3, 7)])
def test_no_rows(shape: tuple[int, ...], backend: str) -> None:
    logits, targets = draw(shape, torch.float32, 1)
    losses, grads = measured(logits, targets, Numbers(0.1), ONE, backend)
    assert losses.shape == shape[:-1]
    assert grads.shape == shape


def test_totals(backend: str) -> None:
    logits, targets = draw((50, 40), torch.float32, 3)
    found = kernel.measure(logits, targets, Terms(0, 40, -100, 0.1, 1e-3), backend)
    counted = targets != -100
    assert int(found.counted) == int(counted.sum())
    assert int(found.correct) == int((counted & (logits.argmax(1) == targets)).sum())
    wanted = exact(logits, targets, Numbers(0.1, 1e-3), ONE).losses.sum()
    torch.testing.assert_close(found.total, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.z, torch.where(counted, 1e-3 * logits.logsumexp(1).square(), 0))


@pytest.mark.parametrize("target", [7, -1, -101, 2**31])
def test_a_target_that_is_no_class(target: int, backend: str) -> None:
    targets = torch.tensor([0, -100, target, 9])
    with pytest.raises(IndexError, match=rf"row 2 is {target}, and there are 7 classes: targets are from 0 to 6, or"):
        kernel.measure(torch.zeros(4, 7), targets, Terms(0, 7, -100, 0.0, 0.0), backend)


# --- Layouts ----------------------------------------------------------------------------------------------------------

def layouts(dtype: torch.dtype) -> dict[str, Tensor]:
    """Logits of which a kernel must find the rows."""
    whole = draw((4, 6, 50), dtype, 1)[0]
    four = whole.view(2, 2, 6, 50)
    return {"one row": whole[0, 0], "shifted": whole[:, :-1], "padded": whole[..., :47], "both": whole[1:, 1:, 3:40],
            "transposed": whole.transpose(0, 1), "classes apart": whole.permute(2, 0, 1),
            "expanded": whole[:1].expand(4, 6, 50), "four": four, "four, shifted": four[:, :, :-1],
            "four, transposed": four.transpose(0, 2), "misaligned": whole.view(-1)[1:1151].view(23, 50),
            "every other": whole[..., ::2]}


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype: torch.dtype, backend: str) -> None:
    for name, logits in layouts(dtype).items():
        targets = draw((*logits.shape[:-1], logits.shape[-1]), dtype, 2)[1]
        check(logits, targets, Numbers(0.1, 1e-3), backend, name)
        given = (torch.stack([targets, targets], -1)[..., 0] if targets.dim() else targets)
        assert_same_bits(measured(logits, given, Numbers(), ONE, backend)[1],
                         measured(logits.contiguous(), targets, Numbers(), ONE, backend)[1], name)


def test_views_are_not_copied() -> None:
    copied = {name for name, logits in layouts(torch.float32).items()
              if rows_of(logits).data_ptr() != logits.data_ptr()}
    assert copied == {"classes apart", "four, transposed", "every other"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(dtype: torch.dtype, backend: str) -> None:
    """The same bits; what lies between the rows is not touched."""
    apart = draw((1050, 20), dtype, 1)[0]  # classes apart: written by way of a copy
    for logits in (apart.t(), apart.view(1050, 2, 2, 5).permute(2, 1, 3, 0)):
        check_in_place(logits, backend)
    whole = draw((4, 6, 1100), dtype, 1)[0]
    whole[:, -1], whole[..., 1050:] = 7.0, 7.0
    check_in_place(whole[:, :-1, :1050], backend)
    assert bool((whole[:, -1] == 7).all())
    assert bool((whole[..., 1050:] == 7).all())


def check_in_place(logits: Tensor, backend: str) -> None:
    targets = draw(tuple(logits.shape), logits.dtype, 2)[1]
    terms = Terms(0, logits.shape[-1], -100, 0.1, 1e-3)
    parts = kernel.measure(logits, targets, terms, backend).parts
    wanted = kernel.differentiate(logits, targets, terms, parts, ONE, None, backend)
    kernel.differentiate(logits, targets, terms, parts, ONE, logits, backend)
    assert_same_bits(logits, wanted)


# --- Bits -------------------------------------------------------------------------------------------------------------

COMPUTED = """
import hashlib, torch
from entropy import Numbers, draw, measured
from fasttrain.kernels import native
said = hashlib.sha256()
for classes in (1, 31, 257, 3000):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits, targets = draw((40, classes), dtype, 5)
        for result in measured(logits, targets, Numbers(0.1, 1e-3), torch.linspace(0, 1, 40), "cpu"):
            said.update(result.view(torch.uint8).numpy().tobytes())
print(native.module().isa(), said.hexdigest())
"""


@needs_native
def test_instruction_sets_give_the_same_bits() -> None:
    check_instruction_sets(COMPUTED)


@needs_native
def test_threads_give_the_same_bits() -> None:
    logits, targets = draw((300, 600), torch.float32, 5)
    found = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        found.append(measured(logits, targets, Numbers(0.1, 1e-3), ONE, "cpu"))
    for losses, grads in found[1:]:
        assert_same_bits(losses, found[0][0])
        assert_same_bits(grads, found[0][1])
