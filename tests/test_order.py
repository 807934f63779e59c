"""The order of samples: bijections and windows, one at a time and in arrays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasttrain.data import DataError, TooSmall, Windows, order, windows
from fasttrain.data.order import mix, mix_each, overlapping, permuted, permuted_each


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permuted_is_a_bijection(n, key):
    assert sorted(permuted(i, n, key) for i in range(n)) == list(range(n))


def test_permuted_depends_on_the_key():
    orders = {tuple(permuted(i, 100, key) for i in range(100)) for key in range(50)}
    assert len(orders) == 50
    assert tuple(range(100)) not in orders


def test_each_pass_takes_each_window_once():
    windows = Windows(np.arange(200, dtype=np.uint8), length=8, seed=3)
    passes = [[windows.start(turn * len(windows) + i) for i in range(len(windows))] for turn in range(6)]
    for starts in passes:
        assert len({s % 8 for s in starts}) == 1
        assert np.diff(sorted(starts)).tolist() == [8] * (len(windows) - 1)
        assert max(starts) + 9 <= 200
    assert len({tuple(p) for p in passes}) == 6
    assert len({p[0] % 8 for p in passes}) > 1, "the offset must differ from pass to pass"


@given(st.integers(2, 20), st.integers(0, 60), st.integers(0, 2**63 - 1), st.integers(0, 10**12))
def test_windows_stay_inside_the_shortest_streams(length, extra, seed, i):
    stream = np.zeros(2 * length + 1 + extra, dtype=np.uint8)
    start = Windows(stream, length, seed).start(i)
    assert 0 <= start <= len(stream) - length - 1


def test_sample_is_a_pure_function_of_seed_and_index():
    stream = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8)
    whole = Windows(stream, 16, seed=1).batch(0, 12)
    shared = np.concatenate([Windows(stream, 16, seed=1).batch(first, 4) for first in (0, 4, 8)])
    assert np.array_equal(whole, shared)
    assert not np.array_equal(whole, Windows(stream, 16, seed=2).batch(0, 12))


@given(st.integers(2, 40), st.integers(1, 200))
def test_overlapping_windows_predict_each_byte_once(length, extra):
    n = length + extra
    starts, fresh_from = overlapping(n, length)
    predicted = [s + 1 + j for s, f in zip(starts, fresh_from, strict=True) for j in range(f, length)]
    assert predicted == list(range(1, n))
    assert all(f >= length // 2 for f in fresh_from[1:]), "each counted byte must have half a window before it"


@given(st.integers(1, 1 << 60), st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), min_size=1),
       st.sampled_from([0, 3, order.FEW]))
def test_arrays_are_permuted_as_numbers_are(n, drawn, few):
    places = np.array([place % n for place, _ in drawn])
    keys = np.array([key for _, key in drawn], np.uint64)
    expected = [permuted(int(place), n, int(key)) for place, key in zip(places, keys, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "FEW", few)
        assert permuted_each(places, n, keys).tolist() == expected


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1))
def test_arrays_are_mixed_as_numbers_are(drawn):
    assert mix_each(np.array(drawn, np.uint64)).tolist() == [mix(x) for x in drawn]


def test_a_million_are_a_bijection():
    found = permuted_each(np.arange(10**6), 10**6, np.full(10**6, 11, np.uint64))
    assert np.array_equal(np.sort(found), np.arange(10**6))
    assert abs(np.corrcoef(found, np.arange(10**6))[0, 1]) < 0.01


@given(st.integers(1, 40), st.integers(0, 500), st.integers(0, 2**63 - 1),
       st.lists(st.integers(0, 2**60), min_size=1, max_size=20))
def test_starts_of_many_are_those_of_each(length, extra, seed, indices):
    windows = Windows(np.zeros(2 * length + 1 + extra, np.uint8), length, seed)
    assert windows.starts(np.array(indices)).tolist() == [windows.start(i) for i in indices]


def test_what_cannot_be_windows():
    with pytest.raises(TooSmall, match="a stream of 16 tokens is too short for windows of 8: it must have at least 17"):
        Windows(np.zeros(16, np.uint8), 8)
    with pytest.raises(DataError, match="at least one"):
        Windows(np.zeros(16, np.uint8), 0)
    with pytest.raises(DataError, match="give a TokenDataset"):
        Windows(np.zeros(99, np.uint8), 8, positions=True)


def test_fingerprints_of_arrays(monkeypatch):
    stream = np.arange(50_000, dtype=np.uint16)
    before = Windows(stream, 7).fingerprint()
    assert Windows(stream.copy(), 7).fingerprint() == Windows(np.repeat(stream, 2)[::2], 7).fingerprint() == before
    stream[-1] ^= 1
    assert Windows(stream, 7).fingerprint() != before
    monkeypatch.setattr(windows, "HASHED", 1000)
    large = Windows(stream, 7).fingerprint()
    assert large == Windows(stream.copy(), 7).fingerprint() != before
    stream[-1] ^= 1
    assert Windows(stream, 7).fingerprint() != large
    assert Windows(stream[:-1], 7).fingerprint() != large


def test_the_order_is_fixed_for_ever():
    """A run that is resumed with a later version goes on in the same order."""
    some = Windows(np.zeros(10_000, np.uint8), 7, seed=5)
    assert [some.start(i) for i in (0, 1, 2, 1426, 1427, 10**12)] == [6008, 2585, 8290, 3523, 8811, 3148]
