"""Buckets: the same bits from every backend, and those of torch's own casts; nothing outside of a slot is touched."""

import math

import invariance
import pytest
import torch
from fake_place import FakePlace
from helpers import (
    CPU,
    GUARD,
    LAYOUTS,
    REALS,
    assert_same_bits,
    covering,
    generator,
    make,
    needs_native,
    normal,
    specials,
    usable,
)
from torch import Tensor
from torch.nn import Parameter

from fasttrain.kernels import native, ring
from fasttrain.kernels.pack import Slots, pack, unpack

BACKENDS = [pytest.param(name, marks=pytest.mark.skipif(usable(name) is not None, reason=str(usable(name))))
            for name in ("reference", "cpu", "triton")]
FAST = BACKENDS[1:]
SCALES = (1.0, 0.5, 1 / 3)
PAIRS = [(a, b) for a in REALS for b in REALS]
COVERING = covering(REALS, REALS, SCALES, (None, *REALS))


def wide(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def cast(values: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """The witness: torch's own cast of the scaled numbers."""
    kind = wide(values.dtype, dtype)
    return (values.to(kind) * torch.tensor(scale, dtype=kind)).to(dtype)


def every_layout(dtype: torch.dtype, numbers: torch.Generator) -> list[Tensor]:
    """One tensor of each layout; special values among the numbers of one."""
    def values(size: tuple[int, ...]) -> Tensor:
        made = normal(size, dtype, numbers)
        if made.numel() >= 1000:
            made[3 : 3 + len(specials(dtype))] = torch.tensor(specials(dtype), dtype=torch.float64).to(dtype)
        return made
    return [make(layout, values).view for layout in LAYOUTS]


def apart(tensors: list[Tensor], gap: int = 3) -> tuple[list[int], int]:
    """Offsets with gaps in between, not in the order of the tensors, and the size of a bucket for them."""
    offsets, at = [0] * len(tensors), 1
    for index in sorted(range(len(tensors)), key=lambda index: (index * 7) % len(tensors)):
        offsets[index] = at
        at += tensors[index].numel() + gap
    return offsets, at


@pytest.mark.parametrize("source, target", PAIRS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_every_pair_of_dtypes_and_layout(backend: str, source: torch.dtype, target: torch.dtype) -> None:
    numbers = generator(1)
    tensors = every_layout(source, numbers)
    offsets, room = apart(tensors)
    for scale in SCALES:
        bucket = torch.full((room,), GUARD, dtype=target)
        pack(tensors, bucket, offsets, scale, backend=backend)
        slots = Slots(bucket, tensors, offsets, backend=backend)
        for layout, tensor, view in zip(LAYOUTS, tensors, slots.views, strict=True):
            assert_same_bits(view, cast(tensor, target, scale), f"{layout}, times {scale}")
            view.fill_(GUARD)
        assert (bucket == GUARD).all(), "written between the slots"


@pytest.mark.parametrize("source, target, scale, kept", COVERING, ids=str)
def test_triton_gives_the_bits_of_the_reference(source, target, scale, kept) -> None:
    if usable("triton") is not None:
        pytest.skip(str(usable("triton")))
    numbers = generator(2)
    tensors = [normal((size,), source, numbers) for size in (0, 5, 1024, 70_001)]
    tensors[2][:19] = torch.tensor(specials(source), dtype=torch.float64)[:19].to(source)
    offsets, room = apart(tensors, gap=1)
    start = None if kept is None else normal((room,), kept, numbers) * 0.01
    found = {}
    for backend in ("reference", "triton"):
        bucket, residual = torch.full((room,), GUARD, dtype=target), None if start is None else start.clone()
        pack(tensors, bucket, offsets, scale, residual, backend)
        found[backend] = bucket, residual
    assert_same_bits(found["triton"][0], found["reference"][0])
    if kept is not None:
        assert_same_bits(found["triton"][1], found["reference"][1], "residual")


@needs_native
@pytest.mark.parametrize("source, target", PAIRS, ids=str)
def test_feedback_has_the_bits_of_the_reference(source: torch.dtype, target: torch.dtype) -> None:
    numbers = generator(3)
    tensors = every_layout(source, numbers)
    offsets, room = apart(tensors)
    for kept in REALS:
        start = normal((room,), kept, numbers) * 0.01
        found = []
        for backend in ("reference", "cpu"):
            bucket, residual = torch.full((room,), GUARD, dtype=target), start.clone()
            pack(tensors, bucket, offsets, 1 / 3, residual, backend)
            found.append((bucket, residual))
        assert_same_bits(found[1][0], found[0][0], f"residual {kept}")
        assert_same_bits(found[1][1], found[0][1], f"residual {kept}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_sent_adds_up_to_what_was_meant(backend: str) -> None:
    """Error feedback: after any number of steps all that is missing is one residual."""
    numbers = generator(4)
    residual, (sent, meant) = torch.zeros(500), torch.zeros(2, 500, dtype=torch.float64)
    bucket = torch.zeros(500, dtype=torch.bfloat16)
    for _ in range(8):
        gradient = normal((500,), torch.float32, numbers)
        pack([gradient], bucket, [0], 0.25, residual, backend)
        sent += bucket
        meant += gradient.double() * 0.25
    # Each step adds one rounding in fp32 of a number below 2; the residual itself is exact.
    assert (sent + residual - meant).abs().max() <= 8 * 2**-24
    assert residual.abs().max() <= 2**-8
    assert (sent - meant).abs().max() > 0, "bfloat16 loses nothing here: the test shows nothing"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_residual_of_what_is_not_finite_is_zero(backend: str) -> None:
    gradient = torch.tensor([math.nan, math.inf, -math.inf, 3.4e38, 1e-45, 1.0])
    bucket, residual = torch.zeros(6, dtype=torch.bfloat16), torch.full((6,), 2.0**-10)
    pack([gradient], bucket, [0], 1.0, residual, backend)
    assert_same_bits(bucket, (gradient + 2.0**-10).bfloat16())
    assert residual[:4].tolist() == [0.0] * 4
    assert residual[5] == 2.0**-10


@pytest.mark.parametrize("target", REALS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_unpack_is_the_inverse(backend: str, target: torch.dtype) -> None:
    numbers = generator(5)
    layouts = LAYOUTS if backend != "triton" else ("empty", "misaligned", "transposed", "strided")
    made = {layout: make(layout, lambda size: normal(size, target, numbers)) for layout in layouts}
    params = [Parameter(one.view) for one in made.values()]
    offsets, room = apart(params)
    bucket = normal((room,), torch.float32, numbers)
    before, versions = bucket.clone(), [p._version for p in params]
    unpack(bucket, params, offsets, 1 / 3, backend)
    for (layout, one), p, view in zip(made.items(), params, Slots(bucket, params, offsets).views, strict=True):
        assert_same_bits(p, cast(view, target, 1 / 3), layout)
        one.check(layout)
    assert_same_bits(bucket, before)
    assert all(p._version > version for p, version in zip(params, versions, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_another_layout_is_brought_into_order(backend: str) -> None:
    numbers = generator(6)
    p = normal((4, 6), torch.float32, numbers).T
    slots = Slots(torch.zeros(24, dtype=torch.bfloat16), [p], [0], backend=backend)
    assert slots.views[0].stride() == p.stride() == (1, 6)
    for gradient in (normal((6, 4), torch.float32, numbers), normal((6, 8), torch.float32, numbers)[:, ::2],
                     torch._neg_view(normal((6, 4), torch.float64, numbers)), torch.ones(1, 4).expand(6, 4),
                     normal((6, 4), torch.float16, numbers).to(memory_format=torch.contiguous_format)):
        assert slots.pack(0, gradient, 0.5) is slots.views[0]
        assert_same_bits(slots.views[0], (gradient.clone() * 0.5).bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_at_a_time_is_all_at_once(backend: str) -> None:
    numbers = generator(7)
    tensors = [normal((size,), torch.float32, numbers) for size in (3, 40_000, 0, 17)]
    offsets, room = apart(tensors)
    made = [Slots(torch.zeros(room, dtype=torch.bfloat16), tensors, offsets, torch.zeros(room), backend) for _ in "ab"]
    made[0].pack_all(tensors, 0.3)
    for index in (2, 0, 3, 1):
        made[1].pack(index, tensors[index], 0.3)
    assert_same_bits(made[0].bucket, made[1].bucket)
    assert_same_bits(made[0].residual, made[1].residual)
    moved = {"elements": 40_020, "bytes_read": 40_020 * 8, "bytes_written": 40_020 * 6}
    assert [slots.moved for slots in made] == [{"launches": 1, **moved}, {"launches": 4, **moved}]
    assert made[0].bucket._version > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slot_may_be_packed_into_itself(backend: str) -> None:
    bucket = torch.arange(8.0)
    slots = Slots(bucket, [torch.empty(3), torch.empty(3)], [0, 4], backend=backend)
    slots.pack(1, slots.views[1], 0.5)
    assert bucket.tolist() == [0, 1, 2, 3, 2, 2.5, 3, 7]
    with pytest.raises(ValueError, match="tensor 0 shares memory with the bucket, and is not its own slot"):
        slots.pack(0, bucket[1:4])
    with pytest.raises(ValueError, match="tensor 0 shares memory"):
        slots.pack_all([bucket[1:4], slots.views[1]], 2.0)
    assert bucket.tolist() == [0, 1, 2, 3, 2, 2.5, 3, 7]


CODE = """
import torch
from fasttrain.kernels import native
from fasttrain.kernels.pack import Slots
numbers = torch.Generator().manual_seed(8)
kinds = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
sizes = (1, 17, 33_000, 255, 100_001)
offsets = [27 + sum((sizes * 4)[:i]) for i in range(4 * len(sizes))]
for kind in kinds:
    tensors = [torch.randn(size, generator=numbers, dtype=torch.float64).to(a) for a in kinds for size in sizes]
    found = []
    for backend, threads in (("reference", 1), ("cpu", 1), ("cpu", 2), ("cpu", 5)):
        torch.set_num_threads(threads)
        size = 4 * sum(sizes) + 100
        slots = Slots(torch.zeros(size, dtype=kind), tensors, offsets, torch.zeros(size), backend)
        slots.pack_all(tensors, 0.3)
        found.append(torch.cat([slots.bucket, slots.residual.to(kind)]))
        assert torch.equal(found[0], found[-1]), (threads, kind)
print(native.module().isa())
"""


@needs_native
@pytest.mark.parametrize("isa", native.build_info().get("isas", []))
def test_instruction_sets_and_threads_do_not_matter(isa: str) -> None:
    invariance.check_on_one(isa, CODE)


BAD = {
    "slots 0 and 1 overlap: slot 0 ends at element 4, and slot 1 begins at 3": dict(offsets=[0, 3]),
    "slot 1 is elements 7 to 11 of a bucket of 10": dict(offsets=[0, 7]),
    "slot 0 is elements -1 to 3": dict(offsets=[-1, 4]),
    "2 tensors and 1 offsets": dict(offsets=[0]),
    r"the bucket is int32; .* float32, float64, bfloat16, float16": dict(bucket=torch.zeros(10, dtype=torch.int32)),
    "the bucket has the shape .5, 2.": dict(bucket=torch.zeros(5, 2)),
    r"the bucket has the shape .10,. and the strides .2,.": dict(bucket=torch.zeros(20)[::2]),
    "tensor 1 is complex64": dict(tensors=[torch.zeros(4), torch.zeros(4, dtype=torch.complex64)]),
    "tensor 1 is sparse_coo": dict(tensors=[torch.zeros(4), torch.zeros(4).to_sparse()]),
    "tensor 0 is on meta and the bucket on cpu": dict(tensors=[torch.zeros(4, device="meta"), torch.zeros(4)]),
    "the residual has 9 elements: it must have 10": dict(residual=torch.zeros(9)),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_is_named_and_writes_nothing(backend: str, message: str) -> None:
    given = {"tensors": [torch.ones(4), torch.ones(4)], "bucket": torch.zeros(10), "offsets": [0, 4], "residual": None}
    given |= BAD[message]
    before = given["bucket"].clone()
    with pytest.raises((TypeError, ValueError), match=message):
        pack(**given, backend=backend)
    assert torch.equal(given["bucket"], before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prepared_bucket_refuses_what_does_not_fit(backend: str) -> None:
    class Other(Tensor):
        pass

    slots = Slots(torch.zeros(10), [torch.ones(4), torch.ones(2, 3)], [0, 4], backend=backend)
    for error, message, index, tensor in (
            (IndexError, "no slot 2: the bucket has 2", 2, torch.ones(4)),
            (IndexError, "no slot -1", -1, torch.ones(4)),
            (ValueError, r"tensor 1 has the shape .3, 2., and its slot .2, 3.", 1, torch.ones(3, 2)),
            (TypeError, "tensor 0 is int64", 0, torch.ones(4, dtype=torch.int64)),
            (TypeError, "tensor 0 is a Other", 0, torch.ones(4).as_subclass(Other))):
        with pytest.raises(error, match=message):
            slots.pack(index, tensor)
    with pytest.raises(ValueError, match="1 tensors for 2 slots"):
        slots.pack_all([torch.ones(4)])
    with pytest.raises(ValueError, match=r"tensor 1 has the shape .3,"):
        slots.pack_all([torch.ones(4), torch.ones(3)])
    with pytest.raises(ValueError, match="tensor 0 has elements that share memory"):
        slots.unpack_all([torch.ones(1).expand(4), torch.ones(2, 3)])
    assert not slots.bucket.any()
    residual = slots.bucket[:10]
    with pytest.raises(ValueError, match="the residual shares memory with the bucket"):
        Slots(slots.bucket, [], [], residual, backend)


def test_no_denormal_number_is_flushed() -> None:
    """Whatever the caller's mode is: gradients are not moments."""
    small = torch.tensor([1e-40, -1e-42, 1e-45])
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush")
    try:
        bucket = torch.zeros(3, dtype=torch.float64, device=CPU)
        slots = Slots(bucket, [small], [0])
        slots.pack(0, small, 2.0)
    finally:
        torch.set_flush_denormal(False)
    if slots.backend == "cpu":
        assert torch.equal(bucket, small.double() * 2)


@pytest.mark.skipif(bool(usable("triton")), reason=str(usable("triton")))
def test_what_triton_sends() -> None:
    """A table is sent once, and then what is not as it was; none of another slot's."""
    tensors = [torch.ones(50), torch.ones(7)]
    slots = Slots(torch.zeros(64), tensors, [0, 50], backend="triton")
    copies = []
    for given, scale in ((tensors, 1.0), (tensors, 1.0), ([tensors[0], torch.ones(7)], 1.0), (tensors, 0.5)):
        before = ring.sent.now()
        slots.pack_all(given, scale)
        copies.append(tuple(now - old for now, old in zip(ring.sent.now(), before, strict=True))[:2])
        kept = given
    assert kept is tensors
    assert copies[:3] == [(1, 2 * 7 * 8), (0, 0), (1, 8)]
    assert copies[3][0] == 1
    assert slots.bucket.tolist() == [0.5] * 57 + [0.0] * 7
    for index, tensor in enumerate(tensors):
        slots.pack(index, tensor)
    before = ring.sent.now()
    slots.pack(0, torch.full((50,), 2.0))
    slots.pack(1, tensors[1])
    assert [now - old for now, old in zip(ring.sent.now(), before, strict=True)][:2] == [1, 8]
    assert slots.bucket.tolist() == [2.0] * 50 + [1.0] * 7 + [0.0] * 7


def test_no_memory_in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said, with a remedy, before anything is written."""
    pytest.importorskip("triton", reason="triton is not installed")
    place = FakePlace()
    place.room = 8
    monkeypatch.setattr("fasttrain.kernels.triton.place_of", lambda device: place)
    bucket = torch.zeros(9)
    with pytest.raises(torch.OutOfMemoryError, match=r"no memory left for the table of a bucket.*empty_cache"):
        pack([torch.ones(9)], bucket, [0], backend="triton")
    assert not bucket.any()
