"""Batches: their order, whatever ranks and workers there are, and going on from a position."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokens import Failing, some_documents, write_dataset

from fasttrain.data import DataError, Loader, Mixture, TokenDataset, TooSmall, Windows, WorkerDied, WrongState
from fasttrain.data.position import Position, numbers, slice_of

STREAM = np.random.default_rng(3).integers(0, 256, 400).astype(np.uint8)
WAYS = [dict(workers=0), dict(workers=1), dict(workers=2, prefetch=3), dict(workers=2, processes=True)]


def windows(length=16):
    return Windows(STREAM, length)  # 23 of them


def tokens_of(loader, steps):
    return torch.stack([next(loader)["tokens"] for _ in range(steps)])


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@given(st.integers(0, 50), st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=6),
       st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_positions_give_what_is_not_skipped(index, skipped, counts):
    position = Position(index)
    for run in skipped:
        position.skip(*run)
    gone = {i for first, count in skipped for i in range(first, first + count)}
    expected = [i for i in range(index, 1000) if i not in gone]
    taken = []
    for count in counts:
        taken += numbers(position.take(count)).tolist()
        assert position.index > taken[-1]
        position = Position(**json.loads(json.dumps({"index": position.index, "skipped": position.skipped})))
    assert taken == expected[: sum(counts)]


@given(st.integers(1, 6), st.integers(1, 5), st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=4))
def test_slices_of_ranks_make_the_whole(world, share, skipped):
    runs = Position(0, skipped).take(world * share)
    slices = [numbers(slice_of(runs, rank, world)) for rank in range(world)]
    assert {len(s) for s in slices} == {share}
    assert np.array_equal(np.concatenate(slices), numbers(runs))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_way_gives_the_samples_in_order(way):
    with Loader(windows(), 4, seed=5, **way) as loader:
        found = tokens_of(loader, 14)  # more than two passes
        assert loader.state_dict()["index"] == loader.index == 56
        assert loader.passes == pytest.approx(56 / 23)
    assert np.array_equal(found.reshape(-1, 17), Windows(STREAM, 16, seed=5).batch(0, 56))


@settings(max_examples=25)
@given(st.sampled_from([1, 2, 3, 4, 6]), st.sampled_from([0, 1, 2]), st.integers(0, 40),
       st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=3))
def test_every_split_over_ranks_and_workers_gives_one_order(world, workers, index, skipped):
    whole = Loader(windows(), 12, seed=1, workers=0)
    state = {**whole.state_dict(), "index": index, "skipped": skipped}
    whole.load_state_dict(state)
    expected = tokens_of(whole, 3)
    parts = []
    for rank in range(world):
        with Loader(windows(), 12, seed=1, rank=rank, world=world, workers=workers) as loader:
            loader.load_state_dict(state)
            parts.append(tokens_of(loader, 3))
    assert torch.equal(torch.cat(parts, 1), expected)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_resumed_at_every_batch_of_a_pass(way):
    """Row 12 of the faults: the next batches are bit-identical, by any way of fetching."""
    with Loader(windows(), 2, seed=9, workers=0) as unbroken, Loader(windows(), 2, seed=9, **way) as resumed:
        states = [unbroken.state_dict()]
        batches = []
        for _ in range(14):
            batches.append(next(unbroken))
            states.append(json.loads(json.dumps(unbroken.state_dict())))
        some = range(12) if not way.get("processes") else (0, 5, 11)  # which start anew each time
        for k in some:
            resumed.load_state_dict(states[k])
            for expected in batches[k : k + 2]:
                found = next(resumed)
                assert torch.equal(found["tokens"], expected["tokens"])
                assert torch.equal(found["indices"], expected["indices"])
            assert resumed.state_dict() == states[k + 2]


def test_world_size_changes_and_back():
    """Row 13: 1 -> 2 -> 4 -> 1 ranks, the same global order."""
    state, found = None, []
    for world in (1, 2, 4, 1):
        parts = []
        for rank in range(world):
            loader = Loader(windows(), 8, seed=2, rank=rank, world=world, workers=0)
            if state:
                loader.load_state_dict(state)
            parts.append(tokens_of(loader, 2))
            after = loader.state_dict()
        state = after
        found.append(torch.cat(parts, 1))
    assert np.array_equal(torch.cat(found).reshape(-1, 17), Windows(STREAM, 16, seed=2).batch(0, 64))


def test_what_is_fetched_ahead_is_not_in_the_state():
    with Loader(windows(), 4, prefetch=5) as loader:
        next(loader)
        assert loader.state_dict()["index"] == 4


def test_skipped_samples_never_come_again():
    with Loader(windows(), 4, seed=1) as loader:
        tokens_of(loader, 2)
        before = loader.state_dict()
        tokens_of(loader, 3)
        loader.rewind(before, 12, 4)  # the loss went up in the batch of samples 12 to 15
        found = [next(loader)["indices"].tolist() for _ in range(2)]
        assert found == [[8, 9, 10, 11], [16, 17, 18, 19]]
        assert loader.state_dict()["skipped"] == [[12, 4]]
        loader.rewind(before, 18, 1)
        assert [next(loader)["indices"].tolist() for _ in range(2)] == [[8, 9, 10, 11], [16, 17, 19, 20]]
        loader.skip(21, 2)
        assert next(loader)["indices"].tolist() == [23, 24, 25, 26]
        with pytest.raises(DataError, match=r"skip\(-1, 3\)"):
            loader.skip(-1, 3)
        state = loader.state_dict()
    with Loader(windows(), 4, seed=1) as again:
        again.load_state_dict(state)
        assert next(again)["indices"].tolist() == [27, 28, 29, 30]


def test_another_batch_size_goes_on_at_the_same_sample_and_says_so(capsys):
    with Loader(windows(), 6, seed=1) as loader:
        tokens_of(loader, 2)
        state = loader.state_dict()
    with Loader(windows(), 4, seed=1) as loader:
        loader.load_state_dict(state)
        assert next(loader)["indices"].tolist() == [12, 13, 14, 15]
    assert "batches have 4 samples now and had 6: going on at sample 12, as batch 3" in capsys.readouterr().err


@pytest.mark.parametrize("other, said", [
    (lambda: Loader(windows(), 4, seed=2), "seed 1 instead of 2"),
    (lambda: Loader(windows(8), 4, seed=1), "length 16 instead of 8"),
    (lambda: Loader(Windows(STREAM[:-1], 16), 4, seed=1), "data "),
    (lambda: Loader(Mixture({"a": (windows(), 1)}), 4, seed=1), "mixture nothing instead of"),
])
def test_other_samples_are_an_error_or_a_printed_remap(other, said, capsys):
    """Row 14 of the faults."""
    with Loader(windows(), 4, seed=1) as loader:
        tokens_of(loader, 3)
        state = loader.state_dict()
    with other() as loader:
        next(loader)
        with pytest.raises(WrongState, match="was saved with .*" + said) as caught:
            loader.load_state_dict(state)
        assert "remap=True" in str(caught.value)
        assert loader.index == 4, "nothing has changed"
        loader.load_state_dict(state, remap=True)
        length = loader.source.fingerprint()["length"]
        assert loader.index * length == 12 * 16, "as many tokens"
    assert said in capsys.readouterr().err


def test_no_state():
    with Loader(windows(), 4) as loader, pytest.raises(WrongState, match="not the state of a loader"):
        loader.load_state_dict({"epoch": 3})


@pytest.mark.parametrize("stop, steps", [(23, 5), (24, 6), (4, 1)])
def test_stop(stop, steps):
    for way in WAYS[:3]:
        with Loader(windows(), 4, stop=stop, **way) as loader:
            assert len(list(loader)) == steps
            assert list(loader) == []
            assert loader.index == 4 * steps


@pytest.mark.parametrize("arguments, message", [
    (dict(batch_size=0), "batch_size=0"),
    (dict(batch_size=6, world=4), "multiple of 4"),
    (dict(batch_size=6, rank=2, world=2), "rank=2 of world=2"),
    (dict(batch_size=6, workers=-1), "workers=-1"),
    (dict(batch_size=6, prefetch=0), "prefetch=0"),
    (dict(batch_size=6, workers=0, processes=True), "processes=True with workers=0"),
    (dict(batch_size=6, stop=5), "not one batch"),
    (dict(batch_size=6, vocabulary=255), "a vocabulary of 255 cannot read tokens up to 255"),
])
def test_arguments_that_cannot_work(arguments, message):
    with pytest.raises(DataError, match=message):
        Loader(windows(), **arguments)


def test_less_data_than_a_batch():
    with pytest.raises(TooSmall, match="one pass over the data has 23 samples and a batch 24"):
        Loader(windows(), 24)
    with pytest.raises(DataError, match="an object of ndarray is not a source"):
        Loader(STREAM, 4)


def test_a_killed_worker_is_named_and_nothing_is_lost():
    """Row 24 of the faults."""
    with Loader(windows(), 4, workers=2, processes=True) as loader:
        next(loader)
        victim = loader._ahead.workers[1][0].process
        kill(victim)
        with pytest.raises(WorkerDied, match=rf"worker 1 of the loader \(process {victim.pid}\) was killed by SIGKILL: "
                                             r"out of memory, or ended by somebody"):
            tokens_of(loader, 9)
        at = loader.index
        assert next(loader)["indices"].tolist() == [at, at + 1, at + 2, at + 3], "the next call starts workers again"


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_what_goes_wrong_is_raised_in_its_turn(way):
    with Loader(Failing(STREAM, 16), 4, **way) as loader:
        tokens_of(loader, 2)
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output error"):
                next(loader)
            assert loader.index == 8
        loader.skip(9, 1)
        assert next(loader)["indices"].tolist() == [8, 10, 11, 12]


def test_sources_that_workers_cannot_get():
    source = Failing(STREAM, 16)
    source.handle = open(os.devnull)  # noqa: SIM115
    with source.handle, Loader(source, 4, workers=1, processes=True) as loader, pytest.raises(
            DataError, match=r"cannot be pickled.*use threads"):
        next(loader)


def test_a_dataset_in_worker_processes(tmp_path):
    dataset = TokenDataset(write_dataset(tmp_path / "d", [some_documents(), some_documents(seed=1)]))
    source = dataset.windows(32, positions=True)
    with Loader(source, 6, seed=1, workers=2, processes=True) as there, Loader(source, 6, seed=1, workers=0) as here:
        for _ in range(5):
            a, b = next(there), next(here)
            assert a.keys() == b.keys() == {"tokens", "positions", "indices"}
            for name in a:
                assert torch.equal(a[name], b[name])


def test_closed_with_its_last_reference():
    loader = Loader(windows(), 4, workers=1, processes=True)
    next(loader)
    process = loader._ahead.workers[0][0].process
    del loader
    assert process.wait(10) == -signal.SIGKILL
