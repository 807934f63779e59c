"""Layouts of buckets: every element in one place, aligned, in equal shards, and the same for everyone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from math import prod
from typing import Any

import pytest
import torch

from fasttrain.dist.layout import Bucket, Entry, FlatLayout, Piece
from fasttrain.kernels.pack import Slots
from tests.helpers import ROOT

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis (pip install fasttrain[test])")
st = hypothesis.strategies

KiB = 1024
SHAPES = st.lists(st.integers(0, 40), max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.float16])
GROUPS = {"data": st.integers(1, 9), "expert": st.integers(1, 4)}


@st.composite
def arguments(draw: Any) -> dict[str, Any]:
    """Of `FlatLayout.of`: any at all."""
    entries = [Entry(f"p{place}", draw(SHAPES), draw(DTYPES), draw(st.sampled_from(["cpu", "cuda:1"])),
                     draw(st.sampled_from(sorted(GROUPS))), None, draw(st.integers(0, 5)) > 0)
               for place in range(draw(st.integers(0, 12)))]
    names = [entry.name for entry in entries if entry.requires_grad]
    size = st.integers(1, 200 * KiB)
    return dict(entries=entries, world={name: draw(ranks) for name, ranks in GROUPS.items()},
                order=draw(st.none() | st.permutations(names)),
                bucket_bytes=draw(size | st.lists(size, min_size=1, max_size=3)), first_bucket_bytes=draw(size),
                align_bytes=draw(st.sampled_from([1, 96, 128, 512])), block=draw(st.sampled_from([1, 128, 256, 384])),
                bucket_dtype=draw(st.none() | DTYPES),
                wire_dtype=draw(st.sampled_from([None, torch.bfloat16, torch.int8])))


def unit_of(bucket: Bucket, given: dict[str, Any]) -> int:
    """By counting up, where the layout takes a least common multiple."""
    sizes = [bucket.dtype.itemsize, (given["wire_dtype"] or bucket.dtype).itemsize]
    return next(unit for unit in range(given["block"], 10**6, given["block"])
                if all(unit * size % given["align_bytes"] == 0 for size in sizes))


@hypothesis.given(arguments())
@hypothesis.settings(max_examples=150, derandomize=True)
def test_every_element_lies_in_one_place(given: dict[str, Any]) -> None:
    layout = FlatLayout.of(**given)
    entries, wanted = given["entries"], [entry for entry in given["entries"] if entry.requires_grad]
    slots = [slot for bucket in layout.buckets for slot in bucket.slots]
    assert sorted(slot.name for slot in slots) == sorted(entry.name for entry in wanted)
    for place, bucket in enumerate(layout.buckets):
        unit = unit_of(bucket, given)
        assert bucket.index == place
        assert bucket.slots
        assert bucket.elements == bucket.shard * given["world"][bucket.group]
        assert bucket.shard % unit == 0
        assert bucket.shard >= unit
        assert bucket.bytes == bucket.elements * bucket.dtype.itemsize
        assert bucket.elements - bucket.slots[-1].start - bucket.slots[-1].numel < unit * (bucket.world + 1)
        filled = torch.zeros(bucket.elements, dtype=torch.int8)
        for slot in bucket.slots:
            entry = entries[slot.index]
            assert (slot.name, slot.bucket, slot.numel) == (entry.name, place, prod(entry.shape))
            assert slot.start % unit == 0
            assert (bucket.device, bucket.group) == (entry.device, entry.group)
            assert bucket.dtype == (given["bucket_dtype"] or entry.dtype)
            assert layout.slot(entry.name) is slot
            filled[slot.start : slot.start + slot.numel] += 1
        assert int(filled.max()) <= 1
        assert int(filled.sum()) == bucket.used == sum(slot.numel for slot in bucket.slots)


@hypothesis.given(arguments())
@hypothesis.settings(max_examples=100, derandomize=True)
def test_buckets_keep_to_order_and_size(given: dict[str, Any]) -> None:
    layout = FlatLayout.of(**given)
    expected = given["order"] or [entry.name for entry in reversed(given["entries"]) if entry.requires_grad]
    assert list(layout.order) == list(expected)
    place = {name: number for number, name in enumerate(expected)}
    later = given["bucket_bytes"] if isinstance(given["bucket_bytes"], list) else [given["bucket_bytes"]]
    last = [place[bucket.slots[-1].name] for bucket in layout.buckets]
    assert last == sorted(last)
    chains: dict[Any, list[Bucket]] = {}
    for bucket in layout.buckets:
        chains.setdefault((bucket.dtype, bucket.device, bucket.group), []).append(bucket)
    for chain in chains.values():
        names = [slot.name for bucket in chain for slot in bucket.slots]
        assert names == sorted(names, key=place.__getitem__)
        limits = [given["first_bucket_bytes"], *later, *[later[-1]] * len(chain)]
        for bucket, limit in zip(chain, limits, strict=False):
            unit = unit_of(bucket, given)
            took = [-(-slot.numel // unit) * unit * bucket.dtype.itemsize for slot in bucket.slots]
            assert sum(took) <= limit or sum(size > 0 for size in took) == 1
        for (bucket, following), limit in zip(pairwise(chain), limits, strict=False):
            unit = unit_of(bucket, given)
            slots = (*bucket.slots, following.slots[0])
            assert sum(-(-slot.numel // unit) * unit * bucket.dtype.itemsize for slot in slots) > limit, "it had room"


@hypothesis.given(arguments())
@hypothesis.settings(max_examples=100, derandomize=True)
def test_ranks_own_every_element_once(given: dict[str, Any]) -> None:
    layout = FlatLayout.of(**given)
    for group, world in given["world"].items():
        owners = {entry.name: torch.zeros(entry.numel, dtype=torch.int32) for entry in given["entries"]
                  if entry.requires_grad and entry.group == group}
        named: dict[str, int] = dict.fromkeys(owners, 0)
        for rank in range(world):
            for name, number, first, count, offset in layout.owned(rank, group):
                bucket, slot = layout.buckets[number], layout.slot(name)
                owners[name][first : first + count] += 1
                named[name] += 1
                assert slot.start + first == rank * bucket.shard + offset
                assert offset + count <= bucket.shard
                assert first % given["block"] == 0, "a cut divides a block"
                assert count > 0 or slot.numel == 0
        assert all(bool((owned == 1).all()) for owned in owners.values())
        assert all(named[name] >= 1 for name in owners)
        assert all(named[name] == 1 for name in owners if owners[name].numel() == 0)


@hypothesis.given(arguments())
@hypothesis.settings(max_examples=100, derandomize=True)
def test_a_layout_survives_json(given: dict[str, Any]) -> None:
    layout = FlatLayout.of(**given)
    text = layout.to_json()
    again = FlatLayout.from_json(text)
    assert again == layout
    assert hash(again) == hash(layout)
    assert again.digest() == layout.digest()
    assert again.to_json() == text
    assert len(layout.table().splitlines()) == len(layout.buckets) + 2
    assert len(layout.table(slots=True).splitlines()) == len(layout.buckets) + len(layout.order) + 2


# --- One layout, by hand ----------------------------------------------------------------------------------------------

def model() -> list[Entry]:
    """Two chains, a frozen entry, one of no elements, one larger than any bucket."""
    return [Entry("embedding", (1000, 4), torch.bfloat16), Entry("frozen", (7,), torch.float32, requires_grad=False),
            Entry("norm", (100,), torch.float32), Entry("weight", (20, 30), torch.bfloat16),
            Entry("none", (0, 3), torch.bfloat16), Entry("head", (300,), torch.bfloat16)]


def small(**changes: Any) -> FlatLayout:
    return FlatLayout.of(model(), **{"world": 4, "bucket_bytes": 4 * KiB, "first_bucket_bytes": KiB, **changes})


def test_a_layout_by_hand() -> None:
    layout = small()
    assert layout.order == ("head", "none", "weight", "norm", "embedding")
    assert [(bucket.dtype, bucket.elements, bucket.shard, bucket.bytes) for bucket in layout.buckets] == [
        (torch.bfloat16, 1024, 256, 2048), (torch.bfloat16, 1024, 256, 2048), (torch.float32, 1024, 256, 4096),
        (torch.bfloat16, 4096, 1024, 8192)]
    assert [[(slot.name, slot.start, slot.numel, slot.index) for slot in bucket.slots] for bucket in layout.buckets] \
        == [[("head", 0, 300, 5), ("none", 512, 0, 4)], [("weight", 0, 600, 3)], [("norm", 0, 100, 2)],
            [("embedding", 0, 4000, 0)]]
    assert layout.owned(2) == [Piece("none", 0, 0, 0, 0), Piece("weight", 1, 512, 88, 0),
                               Piece("embedding", 3, 2048, 1024, 0)]
    assert layout.owned(0)[1] == Piece("weight", 1, 0, 256, 0)


def test_the_order_of_launching_is_that_of_last_gradients() -> None:
    """norm before weight: its chain's bucket is full first."""
    layout = small(order=["norm", "head", "weight", "embedding", "none"])
    assert [bucket.slots[-1].name for bucket in layout.buckets] == ["norm", "head", "weight", "none"]
    assert [slot.name for slot in layout.buckets[3].slots] == ["embedding", "none"]


def test_an_entry_of_no_elements_at_the_end_of_a_full_bucket_has_an_owner() -> None:
    layout = FlatLayout.of([Entry("none", (0,), torch.float32), Entry("full", (1024,), torch.float32)], 4)
    assert layout.slot("none").start == layout.buckets[0].elements
    assert [len(layout.owned(rank)) for rank in range(4)] == [1, 1, 1, 2]
    assert layout.owned(3)[1] == Piece("none", 0, 0, 0, 256)


def test_one_dtype_for_all_buckets_is_one_chain() -> None:
    layout = small(bucket_dtype=torch.float32, bucket_bytes=1 << 20, first_bucket_bytes=1 << 20)
    assert [slot.name for bucket in layout.buckets for slot in bucket.slots] == list(layout.order)
    assert [bucket.dtype for bucket in layout.buckets] == [torch.float32]


def test_sizes_of_single_buckets() -> None:
    entries = [Entry(f"{place}", (256,), torch.float32) for place in range(8)]
    layout = FlatLayout.of(entries, 1, bucket_bytes=[2 * KiB, 3 * KiB], first_bucket_bytes=KiB)
    assert [len(bucket.slots) for bucket in layout.buckets] == [1, 2, 3, 2]
    assert layout.options.limits == (KiB, 2 * KiB, 3 * KiB)


def test_gradients_fit_their_slots() -> None:
    """Packed, scaled over ranks' shards by `owned`, and unpacked: every number is where it should be."""
    shapes = {"a": (3, 5), "b": (2, 3, 4, 5), "none": (0,), "c": (700,)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    tensors["b"] = tensors["b"].to(memory_format=torch.channels_last)
    layout = FlatLayout.of([Entry.of(name, tensor.requires_grad_()) for name, tensor in tensors.items()], 3)
    (bucket,) = layout.buckets
    like = [tensors[slot.name] for slot in bucket.slots]
    slots = Slots(torch.zeros(bucket.elements), like, [slot.start for slot in bucket.slots])
    slots.pack_all(like)
    shards = slots.bucket.view(3, bucket.shard)
    for rank in range(3):
        for name, _, first, count, offset in layout.owned(rank):
            place = [slot.name for slot in bucket.slots].index(name)
            in_memory = torch.as_strided(slots.views[place], (tensors[name].numel(),), (1,))
            assert torch.equal(shards[rank, offset : offset + count], in_memory[first : first + count])
    assert slots.views[0].shape == (700,)
    assert slots.views[2].stride() == tensors["b"].stride()


def test_an_empty_model() -> None:
    layout = FlatLayout.of([], 2)
    assert layout.buckets == ()
    assert layout.owned(1) == []
    assert FlatLayout.from_json(layout.to_json()) == layout
    assert len(layout.table().splitlines()) == 2


# --- The same for everyone --------------------------------------------------------------------------------------------

def test_another_process_makes_the_same_layout() -> None:
    """Under another seed of Python's hashes, which change the order of sets."""
    code = "from tests.test_layout import small; print(small().digest(), small().to_json())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60,
                          env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)})
    assert done.stdout.split() == [small().digest(), small().to_json()], done.stderr


def test_the_digest_stays() -> None:
    """Layouts are compared between versions of this package too: whoever changes one raises FORMAT."""
    assert small().digest() == "de5056bbd2da708fffb6e8e140ba5ef3084a4a54c637c81ae57263eb24be7e5e"


@pytest.mark.parametrize("change", [
    {"world": 2}, {"order": ["head", "weight", "none", "norm", "embedding"]}, {"bucket_bytes": 8 * KiB},
    {"first_bucket_bytes": KiB - 1}, {"align_bytes": 64}, {"block": 128}, {"bucket_dtype": torch.float32},
    {"wire_dtype": torch.bfloat16}, {"world": {"data": 4, "expert": 2}}], ids=str)
def test_whatever_changes_a_layout_changes_its_digest(change: dict[str, Any]) -> None:
    assert small(**change) != small()
    assert small(**change).digest() != small().digest()


def test_each_fact_of_an_entry_changes_the_digest() -> None:
    first = Entry("a", (4, 6), torch.float32)
    others = [Entry("b", (4, 6), torch.float32), Entry("a", (6, 4), torch.float32), Entry("a", (4, 6), torch.float64),
              Entry("a", (4, 6), torch.float32, stride=(1, 4)), Entry("a", (4, 6), torch.float32, "cuda"),
              Entry("a", (4, 6), torch.float32, requires_grad=False)]
    digests = {FlatLayout.of([entry], 1).digest() for entry in [first, *others]}
    assert len(digests) == 1 + len(others)


def test_which_gpu_a_rank_uses_is_its_own_affair() -> None:
    def on(*devices: str) -> FlatLayout:
        return FlatLayout.of([Entry(f"{n}", (5,), torch.float32, device) for n, device in enumerate(devices)], 2)

    assert on("cuda:0", "cuda:1") != on("cuda:2", "cuda:3")
    assert on("cuda:0", "cuda:1").digest() == on("cuda:2", "cuda:3").digest() == on("cuda:3", "cuda:2").digest()
    assert on("cuda:0", "cuda:0").digest() != on("cuda:2", "cuda:3").digest() != on("cuda:2", "cpu").digest()
    assert on("cuda").digest() == on("cuda:1").digest()


def test_strides_that_mean_nothing_are_not_compared() -> None:
    assert Entry("a", (1, 4), torch.float32, stride=(77, 1)) == Entry("a", (1, 4), torch.float32)
    assert Entry("a", (0, 4), torch.float32, stride=(9, 9)) == Entry("a", (0, 4), torch.float32)
    assert Entry("a", (2, 4), torch.float32, stride=(1, 2)) != Entry("a", (2, 4), torch.float32)
    assert Entry.of("a", torch.ones(4, 2, requires_grad=True)) == Entry("a", (4, 2), torch.float32)
    assert Entry.of("a", torch.ones(4, 2), "expert") == Entry("a", (4, 2), torch.float32, group="expert",
                                                              requires_grad=False)


# --- Errors -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, error, told", [
    ({"world": 0}, ValueError, "the world of group 'data' is 0: give at least 1"),
    ({"world": 2.0}, TypeError, "the world of group 'data' is 2.0: give an integer"),
    ({"world": {"expert": 2}}, ValueError, "'embedding' is of the group 'data', whose ranks are not known"),
    ({"bucket_bytes": 0}, ValueError, "bucket_bytes is 0"),
    ({"bucket_bytes": 2.5}, TypeError, "bucket_bytes is 2.5: give an integer"),
    ({"bucket_bytes": [10, -1]}, ValueError, "bucket_bytes is -1"),
    ({"bucket_bytes": []}, ValueError, "bucket_bytes is an empty sequence"),
    ({"first_bucket_bytes": True}, TypeError, "first_bucket_bytes is True: give an integer"),
    ({"align_bytes": 0}, ValueError, "align_bytes is 0"),
    ({"block": -256}, ValueError, "block is -256"),
    ({"bucket_dtype": torch.int8}, TypeError, "bucket_dtype is torch.int8: give float32"),
    ({"wire_dtype": "int8"}, TypeError, "wire_dtype is 'int8': give a torch.dtype"),
    ({"order": ["head", "frozen", "head", "no"]}, ValueError,
     "missing: 'embedding', 'norm', 'weight', 'none'; extra: 'frozen', 'no'; more than once: 'head'"),
], ids=str)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=re.escape(told)):
        small(**change)


def test_bad_entries() -> None:
    entry = Entry("a", (2,), torch.float32)
    with pytest.raises(ValueError, match=r"names that occur more than once: 'a'; .*tied parameter once"):
        FlatLayout.of([entry, entry], 1)
    with pytest.raises(ValueError, match=r"'a' has the shape \(2, -1\)"):
        Entry("a", (2, -1), torch.float32)
    with pytest.raises(ValueError, match=r"strides \(1, 1\): give one for each dimension"):
        Entry("a", (2,), torch.float32, stride=(1, 1))
    with pytest.raises(TypeError, match=r"'a' is torch.complex64; .*view_as_real"):
        Entry("a", (2,), torch.complex64)


def test_a_dtensor_is_given_by_its_local_part() -> None:
    class Whole(torch.Tensor):
        def to_local(self) -> torch.Tensor: ...

    with pytest.raises(TypeError, match=r"'a' is a DTensor.*give tensor.to_local\(\)"):
        Entry.of("a", torch.ones(2).as_subclass(Whole))


def test_many_wrong_names_are_cut_short() -> None:
    with pytest.raises(ValueError, match="'p7' and 92 more") as caught:
        FlatLayout.of([Entry(f"p{place}", (1,), torch.float32) for place in range(100)], 1, order=[])
    assert len(str(caught.value)) < 300


def test_looking_up_what_is_not_there() -> None:
    layout = small()
    with pytest.raises(KeyError, match="'frozen' has no slot: it requires no gradient"):
        layout.slot("frozen")
    with pytest.raises(KeyError, match="'nobody' has no slot: the layout has no such entry"):
        layout.slot("nobody")
    with pytest.raises(ValueError, match="rank 4 is not in the group 'data' of 4"):
        layout.owned(4)
    with pytest.raises(ValueError, match="there is no group 'expert': the layout has data"):
        layout.owned(0, "expert")


def test_changed_json_is_refused() -> None:
    plain = json.loads(small().to_json())
    changes: list[tuple[dict[str, Any], str]] = [
        ({"format": 0}, "the layout has the format 0, and this version of fasttrain reads 1"),
        ({"buckets": plain["buckets"][:-1]}, "not those that its entries and options give"),
        ({"order": plain["order"][:-1]}, "missing: 'embedding'"),
        ({"worlds": {"data": "2"}}, "this is no layout"),
        ({"entries": [{**plain["entries"][0], "dtype": "nn"}]}, "this is no layout"),
        ({"entries": [{"name": "a"}]}, "this is no layout"),
        ({"extra": 1}, "not those that its entries and options give"),
    ]
    for change, told in changes:
        with pytest.raises(ValueError, match=told):
            FlatLayout.from_json(json.dumps({**plain, **change}))
    for text in ("", "[]", "{}", "3", small().to_json()[:-1]):
        with pytest.raises(ValueError, match="this is no layout written by to_json"):
            FlatLayout.from_json(text)
