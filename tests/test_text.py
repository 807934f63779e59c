"""The text: found, divided and ordered by pure functions."""

import os
import socket

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasttrain.train import text
from fasttrain.train.config import BadInput
from fasttrain.train.text import Windows, overlapping, permuted


def write(root, **files):
    for name, data in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def many(root, count=60):
    return write(root, **{f"d{i % 3}__f{i}": b"file %d says %d.\n" % (i, i * i) * 20 for i in range(count)})


def parts(read):
    return [set(part.tobytes().split(b"\0")) - {b""} for part in (read.train, read.held_out)]


def test_standard_library():
    read = text.load(None, 0.03, 256)
    assert read.train.dtype == np.uint8
    assert len(read.train) > 5_000_000
    assert 20_000 < len(read.held_out) < len(read.train) / 8
    joined = read.train.tobytes() + read.held_out.tobytes()
    assert b"class Fraction(numbers.Rational)" in joined
    assert b"import torch\n" not in joined, "site-packages are not the standard library"


def test_no_file_in_both_parts_and_all_in_one(tmp_path):
    train, held_out = parts(text.load(many(tmp_path), 0.2, 8))
    assert not train & held_out
    assert len(train) + len(held_out) == 60
    assert 3 <= len(held_out) <= 24


def test_division_depends_only_on_relative_paths(tmp_path):
    a = text.load(many(tmp_path / "a"), 0.2, 8)
    b = text.load(many(tmp_path / "elsewhere" / "b"), 0.2, 8)
    assert a.sha256 == b.sha256
    assert np.array_equal(a.held_out, b.held_out)
    fewer = text.load(many(tmp_path / "c", count=40), 0.2, 8)
    assert parts(fewer)[1] == parts(a)[1] & (parts(fewer)[0] | parts(fewer)[1]), "other files must not move a file"


def test_the_hash_of_a_path_is_fixed_for_ever():
    assert [round(text._share(name), 6) for name in ("a.py", "json/decoder.py", "é")] == [0.940888, 0.231174, 0.291402]


def test_sum_tells_texts_apart(tmp_path):
    a = text.load(many(tmp_path / "a"), 0.2, 8)
    root = many(tmp_path / "b")
    (root / "d0" / "f0").write_bytes(b"something else\n")
    assert text.load(root, 0.2, 8).sha256 != a.sha256


def test_two_files_give_both_parts(tmp_path):
    for share in (0.0001, 0.9999):
        train, held_out = parts(text.load(write(tmp_path, a=b"a" * 99, b=b"b" * 99), share, 8))
        assert len(train) == len(held_out) == 1


def test_one_file_is_cut(tmp_path):
    read = text.load(write(tmp_path, only=bytes(range(1, 201))) / "only", 0.1, 8)
    assert read.train.tolist() == [*range(1, 181), 0]
    assert read.held_out.tolist() == [*range(181, 201), 0]


def test_what_is_not_text_is_left_out(tmp_path):
    write(tmp_path, good=b"words " * 50, binary=b"\0\1\2" * 50, empty=b"", **{".hidden": b"no", ".git__x": b"no"})
    os.mkfifo(tmp_path / "pipe")  # to read it would wait for ever
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(tmp_path / "s"))
    assert {bytes(p) for part in parts(text.load(tmp_path, 0.1, 8)) for p in part} == {
        b"words " * 45, b"words " * 5}


@pytest.mark.parametrize("make, message", [
    (lambda d: d / "absent", "absent: No such file"),
    (lambda d: write(d, e=b"", f=b""), "no text file that is not empty"),
    (lambda d: write(d, e=b"") / "e", "no text file that is not empty"),
    (lambda d: write(d, e=b"a\0b") / "e", "contains a zero byte"),
    (lambda d: write(d, a=b"x" * 20, b=b"y" * 20), "--sequence 64 is too long"),
])
def test_bad_text(tmp_path, make, message):
    with pytest.raises(BadInput, match=message) as caught:
        text.load(make(tmp_path), 0.1, 64)
    assert "\n" not in str(caught.value)


def test_unreadable_file_is_named(tmp_path):
    root = many(tmp_path)
    (root / "d1" / "gone").symlink_to(root / "nowhere")
    with pytest.raises(BadInput, match="gone: No such file"):
        text.load(root, 0.1, 8)


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
