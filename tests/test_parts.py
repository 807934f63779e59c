"""Parts of parameters come out in the bits of the whole, whoever steps them: also where the host does."""

import hashlib
from itertools import pairwise

import pytest
import torch
from fake_link import FakeLink
from helpers import assert_same_bits, generator
from stored import states
from torch.nn import Parameter

from fasttrain.dist.layout import Entry, FlatLayout
from fasttrain.optim import AdamW, Lion, twin
from fasttrain.optim.part import Part, declare, declared, size_of
from fasttrain.parallel.zero_cut import owned, shards, whole

CUTS = (0, 256, 1024, 1300)
CASES = [(AdamW, {"storage": "5-byte", "min_size": 1300}), (AdamW, {"storage": "6-byte", "min_size": 1301}),
         (Lion, {"master": "stochastic", "ema_decay": 0.9, "ema_dtype": "bf16"})]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(("cls", "options"), CASES)
def test_parts_have_the_bits_of_the_whole(cls, options, offload, monkeypatch):
    numbers = generator(0)
    value = torch.randn(1300, generator=numbers).bfloat16()
    one = Parameter(value.clone())
    identity = int.from_bytes(hashlib.blake2b(b"weight", digest_size=8).digest(), "little")
    parts = [Parameter(value[begin:end].clone()) for begin, end in pairwise(CUTS)]
    for part, first in zip(parts, CUTS, strict=False):
        declare(part, Part(identity, first, 1300))
    entire = cls([("weight", one)], lr=0.1, **options)
    if offload:
        monkeypatch.setattr(twin, "link_of", lambda device: FakeLink("late"))
    cut = cls([(f"weight {n}", part) for n, part in enumerate(parts)], lr=0.1, offload=offload, **options)
    for _ in range(3):
        grad = torch.randn(1300, generator=numbers).bfloat16()
        one.grad = grad
        for part, (begin, end) in zip(parts, pairwise(CUTS), strict=True):
            part.grad = grad[begin:end].clone()
        entire.step()
        cut.step()
    assert_same_bits(torch.cat([part.detach() for part in parts]), one.detach())
    for key, wanted in states(entire, [one])[0].items():
        if wanted.dim():
            assert_same_bits(torch.cat([state[key] for state in states(cut, parts)]), wanted, key)


def test_what_is_declared_ends_with_the_tensor():
    part = Parameter(torch.ones(4))
    declare(part, Part(7, 256, 1000))
    assert declared(part) == Part(7, 256, 1000)
    assert size_of(part) == 1000
    assert declared(Parameter(torch.ones(4))) is None
    assert size_of(torch.ones(4)) == 4


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_element_has_one_owner(world):
    shapes = [(300, 4), (0, 3), (7,), (), (513,), (2000,), (40, 40), (1,)]
    layout = FlatLayout.of([Entry(f"{n}", shape, torch.float32) for n, shape in enumerate(shapes)], world,
                           bucket_bytes=8000, first_bucket_bytes=2000)
    costs = {entry.name: float(entry.numel + 1) for entry in layout.entries}
    even = [shards(bucket) for bucket in layout.buckets]
    for name, cuts in (("shards", even), ("whole", whole(layout.buckets, costs))):
        load = [0.0] * world
        for bucket, cut in zip(layout.buckets, cuts, strict=True):
            times = [torch.zeros(slot.numel) for slot in bucket.slots]
            owners = [0] * len(bucket.slots)
            for rank in range(world):
                for one in owned(bucket, cut, rank):
                    times[one.place][one.first : one.first + one.numel] += 1
                    owners[one.place] += 1
                    load[rank] += one.numel
                    slot = bucket.slots[one.place]
                    if one.numel:
                        assert cut[rank][0] + one.at == slot.start + one.first
                        assert one.first % 256 == 0
                        assert name == "shards" or one.numel == slot.numel
            assert all(bool((count == 1).all()) for count in times)
            assert all(count == 1 or (slot.numel > 0 and name == "shards")
                       for count, slot in zip(owners, bucket.slots, strict=True))
        if name == "whole":  # no better than the largest parameter allows
            assert max(load) <= max(2000, sum(load) / world) + 1200
