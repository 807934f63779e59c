"""The text: found and divided by pure functions."""

import os
import socket

import numpy as np
import pytest

from fasttrain.data.documents import share_of_path
from fasttrain.train import text
from fasttrain.train.config import BadInput


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
    shares = [round(share_of_path(name), 6) for name in ("a.py", "json/decoder.py", "é")]
    assert shares == [0.940888, 0.231174, 0.291402]


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
