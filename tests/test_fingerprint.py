"""Fingerprints: every difference is found, told in words, and told alike on every rank."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import ranks
import torch

from fasttrain.dist import difference
from fasttrain.dist.fingerprint import DisagreementError, Fingerprint, agree, compare, fingerprint
from fasttrain.dist.layout import Entry, FlatLayout

VERSIONS = {"torch": "2.13.0", "fasttrain": "0.1.0"}


def entries(device: str = "cpu") -> list[Entry]:
    return [Entry("embedding", (50, 8), torch.float32, device), Entry("weight", (8, 8), torch.float32, device),
            Entry("bias", (8,), torch.float32, device)]


def made(change: Callable[[list[Entry]], Any] = lambda entries: None, layout: dict[str, Any] | None = None,
         versions: dict[str, str] = VERSIONS, mesh: dict[str, int] | None = None, **options: Any) -> Fingerprint:
    """The fingerprint of `entries()` after a change in place."""
    changed = entries()
    change(changed)
    laid = FlatLayout.of(changed, **{"world": 2, **(layout or {})})
    return fingerprint(changed, laid, {"zero": 1, "accumulate": {"steps": 4}, **options}, versions,
                       mesh or {"data": 2, "model": 1})


def at(place: int, **facts: Any) -> Callable[[list[Entry]], None]:
    def change(changed: list[Entry]) -> None:
        changed[place] = replace(changed[place], **facts)
    return change


DIFFERENCES = {
    "order of names": (dict(change=lambda e: e.reverse()),
                       ["the order of parameters, at 2 places, first at 0: 'bias' on rank 1, 'embedding' on rank 0"]),
    "shape": (dict(change=at(1, shape=(8, 4), stride=None)),
              ["parameter 'weight': shape: [8, 4] on rank 1, [8, 8] on rank 0"]),
    "stride": (dict(change=at(1, stride=(1, 8))), ["parameter 'weight': stride: [1, 8] on rank 1, [8, 1] on rank 0"]),
    "dtype": (dict(change=at(2, dtype=torch.bfloat16)),
              ["parameter 'bias': dtype: 'bfloat16' on rank 1, 'float32' on rank 0"]),
    "requires_grad": (dict(change=at(0, requires_grad=False)),
                      ["parameter 'embedding': requires_grad: false on rank 1, true on rank 0"]),
    "device": (dict(change=at(0, device="cuda:3")),
               ["parameter 'embedding': device: 'cuda:0' on rank 1, 'cpu:0' on rank 0"]),
    "group": (dict(change=at(0, group="expert"), layout={"world": {"data": 2, "expert": 1}}),
              ["parameter 'embedding': group: 'expert' on rank 1, 'data' on rank 0",
               "layout.worlds.expert: 1 on rank 1, (absent) on rank 0"]),
    "one less": (dict(change=lambda e: e.pop(1)), ["parameters on rank 0 and not on rank 1: 'weight'"]),
    "one renamed": (dict(change=at(1, name="wait")), ["parameters on rank 1 and not on rank 0: 'wait'",
                                                      "parameters on rank 0 and not on rank 1: 'weight'"]),
    "sizes": (dict(layout={"bucket_bytes": 1000}), ["layout.options.bucket_bytes: 1000 on rank 1, 26214400 on rank 0"]),
    "wire": (dict(layout={"wire_dtype": torch.bfloat16}),
             ["layout.options.wire_dtype: 'bfloat16' on rank 1, null on rank 0"]),
    "world": (dict(layout={"world": 3}), ["layout.worlds.data: 3 on rank 1, 2 on rank 0"]),
    "recorded order": (dict(layout={"order": ["weight", "bias", "embedding"]}),
                       ["the order of gradients, at 2 places, first at 0: 'weight' on rank 1, 'bias' on rank 0"]),
    "mesh": (dict(mesh={"model": 1, "data": 2}),
             ['mesh: [["model", 1], ["data", 2]] on rank 1, [["data", 2], ["model", 1]] on rank 0']),
    "option": (dict(zero=2), ["options.zero: 2 on rank 1, 1 on rank 0"]),
    "option of another kind": (dict(zero=True), ["options.zero: true on rank 1, 1 on rank 0"]),
    "inner option": (dict(accumulate={"steps": 8}), ["options.accumulate.steps: 8 on rank 1, 4 on rank 0"]),
    "option absent": (dict(more=None), ["options.more: null on rank 1, (absent) on rank 0"]),
    "version": (dict(versions={**VERSIONS, "torch": "2.11.0"}),
                ["versions.torch: '2.11.0' on rank 1, '2.13.0' on rank 0"]),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_every_difference_is_told(name: str) -> None:
    given, told = DIFFERENCES[name]
    ours, theirs = made(), made(**given)
    assert not torch.equal(ours.digest, theirs.digest)
    text = compare([ours.details, theirs.details])
    assert text is not None
    assert text.splitlines() == ["The ranks were not built alike.", "Rank 1 differs from rank 0:",
                                 *(f"  {line}" for line in told),
                                 "Build the same model with the same options and versions on every rank."]


def test_what_is_equal_is_equal() -> None:
    digest = made().digest
    assert (digest.dtype, digest.shape) == (torch.uint8, (32,))
    assert torch.equal(digest, made().digest)
    assert compare([made().details] * 3) is None
    assert compare([made().details]) is None
    assert not torch.equal(digest, made(zero=0).digest)


def test_ranks_on_their_own_gpus_agree() -> None:
    def on(device: str) -> Fingerprint:
        here = entries(device)
        return fingerprint(here, FlatLayout.of(here, 2), {"device": torch.device(device)}, VERSIONS)

    assert on("cuda:0") == on("cuda:3") != on("cpu")


def test_options_of_every_kind() -> None:
    def hook(bucket: Any) -> None: ...

    details = made(a=[1, (2.5, None)], b={"x": torch.bfloat16}, c=hook, d=Entry, e=torch.relu, f=False).details
    for part in ('"a":[1,[2.5,null]]', '"b":{"x":"bfloat16"}', 'hook"', '"d":"fasttrain.dist.slots.Entry"', 'relu"'):
        assert part in details
    with pytest.raises(TypeError, match=r"the option a\[1\].b is <object object .* cannot be compared"):
        made(a=[1, {"b": object()}])
    with pytest.raises(ValueError, match="several entries have one name"):
        fingerprint(entries() * 2, FlatLayout.of(entries(), 2))


def test_this_package_and_torch_are_the_versions() -> None:
    details = fingerprint(entries(), FlatLayout.of(entries(), 2)).details
    assert f'"torch":"{torch.__version__}"' in details
    assert '"fasttrain":"' in details


def test_the_many_tell_who_is_wrong() -> None:
    kinds = [made(zero=zero).details for zero in (0, 1, 1, 2, 1, 1, 0)]
    told = (compare(kinds) or "").splitlines()
    assert told[1:-1] == ["Ranks 0, 6 differ from ranks 1, 2, 4, 5:", "  options.zero: 0 on rank 0, 1 on rank 1",
                          "Rank 3 differs from ranks 1, 2, 4, 5:", "  options.zero: 2 on rank 3, 1 on rank 1"]


def test_the_text_is_bounded() -> None:
    """A thousand ranks, all different, in a thousand parameters with long names."""
    def model(rank: int) -> str:
        many = [Entry("x" * 1000 + f".{rank % 2}.{place}", (rank + 1,), torch.float32) for place in range(1000)]
        return fingerprint(many, FlatLayout.of(many, 2), {"text": "y" * 10_000 + str(rank)}, VERSIONS).details

    details = [model(rank) for rank in range(7)]
    text = compare(details) or ""
    assert len(text) < 20_000
    assert "and 994 more" in text
    assert "differences more" in text
    assert "Ranks 5, 6 differ in other ways still." in text
    many = [made(zero=1).details, *(made(zero=rank).details for rank in range(2, 40))]
    assert len(compare(many * 9) or "") < 2_000
    wide = (compare([made(zero=int(rank % 3 == 0)).details for rank in range(1000)]) or "").splitlines()
    assert wide[1] == ("Ranks 0, 3, 6, 9, 12, 15, 18, 21 and others, 334 in all differ from "
                       "ranks 1, 2, 4, 5, 7, 8, 10, 11 and others, 666 in all:")


def test_another_format_is_told_without_reading_it() -> None:
    newer, older = ({"format": number, "versions": {"fasttrain": f"0.{number}"}} for number in (2, 1))
    lines = difference.of(newer, older, "rank 1", "rank 0")
    assert lines == ["versions.fasttrain: '0.2' on rank 1, '0.1' on rank 0",
                     "format of the fingerprint: 2 on rank 1, 1 on rank 0"]


# --- Through a wire ---------------------------------------------------------------------------------------------------

class Threads:
    """Ranks that are threads, and count what they send."""

    device = torch.device("cpu")

    def __init__(self, rank: int, ranks: list[int], meeting: threading.Barrier, table: list[Any]):
        self.rank, self.ranks, self.meeting, self.table = rank, ranks, meeting, table
        self.gathered, self.broadcast = 0, 0

    def _exchange(self, value: Any) -> list[Any]:
        self.meeting.wait(20)
        self.table[self.rank] = value
        self.meeting.wait(20)
        return list(self.table)

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.gathered += tensor.nbytes
        found = self._exchange(tensor.clone())
        assert len({t.shape for t in found}) == 1, "an all-gather takes tensors of one shape"
        return found

    def broadcast_(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        self.broadcast += tensor.nbytes
        found = self._exchange(tensor.clone())
        assert len({t.shape for t in found}) == 1
        return tensor.copy_(found[source])


def on_threads(fingerprints: list[Fingerprint], numbers: list[int] | None = None) -> list[tuple[str | None, int, int]]:
    """What each rank raised, and the bytes that it gathered and broadcast."""
    size = len(fingerprints)
    meeting, table = threading.Barrier(size), [None] * size
    found: list[Any] = [None] * size

    def run(rank: int) -> None:
        wire, error = Threads(rank, numbers or list(range(size)), meeting, table), None
        try:
            agree(wire, fingerprints[rank])
        except DisagreementError as raised:
            error = str(raised)
        found[rank] = (error, wire.gathered, wire.broadcast)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert None not in found, "a rank did not come back"
    return found


def test_ranks_that_agree_send_forty_bytes() -> None:
    assert on_threads([made()] * 4) == [(None, 40, 0)] * 4
    assert on_threads([made()]) == [(None, 40, 0)]


def test_every_rank_raises_the_same() -> None:
    given = [made(), made(at(1, dtype=torch.float16)), made(), made(zero=3)]
    found = on_threads(given)
    assert {error for error, _, _ in found} == {compare([one.details for one in given])}
    assert {(gathered, broadcast) for _, gathered, broadcast in found} == {
        (40, sum(len(given[rank].details.encode()) for rank in (0, 1, 3)))}


def test_ranks_are_named_by_their_numbers_among_all() -> None:
    (error, _, _), *_ = on_threads([made(), made(), made(zero=3)], [4, 5, 9])
    assert "Rank 9 differs from ranks 4, 5:" in (error or "")
    assert "options.zero: 3 on rank 9, 1 on rank 4" in (error or "")


def test_few_kinds_send_their_details() -> None:
    found = on_threads([made(zero=rank) for rank in range(9)])
    assert len({error for error, _, _ in found}) == 1
    assert "Ranks 5-8 differ in other ways still." in (found[0][0] or "")
    assert found[0][2] == 5 * len(made(zero=0).details)


def every_difference(wire: Any) -> dict[str, str]:
    """What is raised where rank 1 differs in one thing after the other: the wire goes on working."""
    texts = {}
    for name, (given, _) in DIFFERENCES.items():
        agree(wire, made())
        with pytest.raises(DisagreementError) as caught:
            agree(wire, made(**given) if wire.rank == 1 else made())
        texts[name] = str(caught.value)
    return texts


def test_processes_raise_the_same() -> None:
    first, *others = ranks.run(every_difference, 3)
    assert others == [first, first]
    for name, (given, _) in DIFFERENCES.items():
        assert first[name] == compare([made().details, made(**given).details, made().details])
