"""Damage of every kind: found every time, the file and tensor named, and never taken for a checkpoint."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpointing import proven, save

from fasttrain.checkpoint import header, manifest, mapped
from fasttrain.checkpoint.files import (
    CheckpointError,
    Damaged,
    Incomplete,
    Malformed,
    NotACheckpoint,
    Piece,
    Reader,
    complete,
    newest,
    publish,
    verify,
    write_rank,
)

NAMES = ("manifest.json", "rank-00000-of-00002.json", "rank-00001-of-00002.json", "rank-00000-of-00002.safetensors",
         "rank-00001-of-00002.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of two ranks."""
    root = tmp_path_factory.mktemp("whole")
    for step in (1, 2):
        save(root, step, 2)
    return root


@pytest.fixture
def two(whole: Path, tmp_path: Path) -> Path:
    """Copies of them, for a test to damage."""
    shutil.copytree(whole, tmp_path / "two")
    return tmp_path / "two"


def last(root: Path) -> Path:
    return root / "step-000000000002"


@pytest.mark.parametrize("left", ["nothing", "one byte", "half", "all but one"])
@pytest.mark.parametrize("name", NAMES)
def test_cut_off(name: str, left: str, two: Path) -> None:
    path = last(two) / name
    size = path.stat().st_size
    os.truncate(path, {"nothing": 0, "one byte": 1, "half": size // 2, "all but one": size - 1}[left])
    found = newest(two)
    assert found is not None
    assert found.step == 1
    refused = next(one for one in complete(two) if one.path == last(two))
    assert refused.reason is not None
    assert name in refused.reason
    damages = verify(two)
    assert {damage.file for damage in damages} == {path}
    if name.endswith(".safetensors"):
        cut = [damage for damage in damages if damage.tensor is not None]
        assert cut
        assert all("cut off" in damage.what for damage in cut)


def regions(path: Path) -> list[tuple[str, str | None, int, int]]:
    """Every region of every file: (file, tensor, first byte, end)."""
    found: list[tuple[str, str | None, int, int]] = []
    for name in NAMES:
        size = (path / name).stat().st_size
        if name.endswith(".json"):
            lines = [0, *(number + 1 for number, byte in enumerate((path / name).read_bytes()) if byte == 10)]
            found += [(name, None, low, high) for low, high in pairwise(lines)]
            continue
        with Reader(path) as reader:
            parts = [(tensor, part) for tensor, stored in reader.tensors.items() for part in stored.parts
                     if part.file == name and part.nbytes]
        begin = min(part.offset for _, part in parts)
        found += [(name, None, 0, 8), (name, None, 8, begin)]
        found += [(name, tensor, part.offset, part.offset + part.nbytes) for tensor, part in parts]
        assert max(high for file, _, _, high in found if file == name) == size
    return found


def test_one_bit_anywhere(two: Path) -> None:
    """In every line of every manifest, in the length and the text of every header, in every tensor: one, at random."""
    draw, flips = random.Random(1), 0
    for name, tensor, low, high in regions(last(two)):
        path = last(two) / name
        content = path.read_bytes()
        for place in {low, high - 1, draw.randrange(low, high)}:
            flipped = bytearray(content)
            flipped[place] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
            with pytest.raises(Damaged) as caught:
                proven(last(two))
            assert caught.value.file == path
            assert caught.value.tensor == tensor
            assert [(damage.file, damage.tensor) for damage in verify(last(two))] == [(path, tensor)]
            flips += 1
        path.write_bytes(content)
    assert proven(last(two)) == 2
    assert verify(two) == []
    assert flips > 100


def test_every_bit_of_a_manifest(two: Path) -> None:
    """All of them: a manifest is what everything else is believed by."""
    path = last(two) / "manifest.json"
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            with pytest.raises(Damaged):
                manifest.decode(path, bytes(flipped))


def test_a_page_of_zeros(tmp_path: Path) -> None:
    """A write that was lost: wherever a page of 4 KiB falls."""
    data = np.random.default_rng(0).integers(1, 256, 50_000).astype(np.uint8)
    write_rank(tmp_path / ".part", 0, 1, [Piece("w", "U8", (50_000,), memoryview(data))], {}, chunk=16384)
    path = publish(tmp_path, tmp_path / ".part", 2, 1)
    file = path / "rank-00000-of-00001.safetensors"
    content = file.read_bytes()
    for page in range(0, len(content), 4096):
        file.write_bytes(content[:page] + bytes(len(content[page : page + 4096])) + content[page + 4096 :])
        with Reader(path) as reader, pytest.raises(Damaged) as caught:
            reader.read("w")
        assert caught.value.tensor == (None if page == 0 else "w")
        assert {damage.tensor for damage in verify(path)} == ({None, "w"} if page == 0 else {"w"})


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_gone(name: str, two: Path) -> None:
    (last(two) / name).unlink()
    with pytest.raises(NotACheckpoint if name == "manifest.json" else Incomplete, match=name):
        Reader(last(two))
    found = newest(two)
    assert found is not None
    assert found.step == 1
    assert [damage.file.name for damage in verify(two)] == [last(two).name if name == "manifest.json" else name]


@pytest.mark.parametrize("name", ["rank-00000-of-00002-1.safetensors", "rank-00002-of-00003.json", "notes.txt"])
def test_a_file_too_many(name: str, two: Path) -> None:
    (last(two) / name).write_bytes(b"?")
    with pytest.raises(Malformed, match=f"{name}: no manifest of this checkpoint names it; move it away"):
        Reader(last(two))
    assert [damage.file.name for damage in verify(two)] == [name]


@pytest.mark.parametrize("name", NAMES)
def test_files_of_two_checkpoints_swapped(name: str, two: Path) -> None:
    """Each is whole in itself, and of the same size perhaps."""
    one, other = (two / f"step-00000000000{step}" / name for step in (1, 2))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    for path in (one, other):
        with pytest.raises(CheckpointError) as caught:
            proven(path.parent)
        assert str(path.parent) in str(caught.value)
    assert {damage.file.parent for damage in verify(two)} == {one.parent, other.parent}


def test_a_link_or_a_directory_in_place_of_a_file(two: Path) -> None:
    for name in NAMES:
        path = last(two) / name
        path.rename(two / "aside")
        path.symlink_to(two / "aside")
        with pytest.raises(Damaged, match=name):
            Reader(last(two))
        path.unlink()
        path.mkdir()
        with pytest.raises(Damaged, match=name):
            Reader(last(two))
        path.rmdir()
        (two / "aside").rename(path)
    assert proven(last(two)) == 2


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A rank's manifest with something changed, and every checksum made right again: no accident, a forgery."""
    tree = manifest.decode(path, path.read_bytes())
    del tree["xxh3_128"]
    change(tree)
    path.write_bytes(manifest.encode(tree))
    top = path.with_name("manifest.json")
    told = manifest.decode(top, top.read_bytes())
    del told["xxh3_128"]
    entry = next(entry for entry in told["ranks"] if entry["file"] == path.name)
    entry |= {"size": path.stat().st_size, "xxh3": manifest.digest(path.read_bytes())}
    top.write_bytes(manifest.encode(told))


def tensor(key: str, value: Any, which: int = 0) -> Callable[[dict[str, Any]], None]:
    """The first has one chunk, the second several."""
    return lambda tree: tree["tensors"][which].__setitem__(key, value)


@pytest.mark.parametrize("change,words", [
    (tensor("file", "../../etc/passwd"), "which is not among the files"),
    (tensor("file", "/etc/passwd"), "which is not among the files"),
    (lambda tree: tree["files"].__setitem__("../x.safetensors", tree["files"]["rank-00000-of-00002.safetensors"]),
     "is not how a file of this rank is named"),
    (tensor("dtype", "PICKLE"), "unknown dtype 'PICKLE'"), (tensor("dtype", ["F32"]), "dtype is .* no str"),
    (tensor("offset", 1 << 60), "fit neither"), (tensor("offset", -8), "no count"),
    (tensor("offset", 0), "fit neither"), (tensor("nbytes", True), "no count"), (tensor("nbytes", 8.0), "no count"),
    (tensor("shape", [1 << 70]), "fit neither"), (tensor("shape", [-1, -4]), "non-negative integers"),
    (tensor("shape", "ab"), "non-negative integers"), (tensor("span", [0, 1 << 50]), "runs past"),
    (tensor("xxh3", "0" * 32, 1), "do not belong together"), (tensor("xxh3", "zz"), "no checksum"),
    (tensor("chunks", ["0" * 32], 1), "1 checksums of 5 chunks"), (tensor("name", 5), "no str"),
    (lambda tree: tree["tensors"][1].__setitem__("offset", tree["tensors"][0]["offset"]), "overlaps"),
    (lambda tree: tree.__setitem__("chunk", 0), "chunks of 0 bytes"),
    (lambda tree: tree.__setitem__("values", None), "values is 'None', no dict"),
    (lambda tree: tree.__setitem__("rank", 1), "it is that of rank 1 of 2"),
    (lambda tree: tree["files"]["rank-00000-of-00002.safetensors"].__setitem__("size", 1), "is to have a header"),
])
def test_manifests_that_no_writer_makes(change: Callable[[dict[str, Any]], None], words: str, two: Path) -> None:
    rewritten(last(two) / "rank-00000-of-00002.json", change)
    with pytest.raises(Malformed, match=words):
        Reader(last(two))
    assert [damage.file.name for damage in verify(two)] == ["rank-00000-of-00002.json"]


def forged(path: Path, text: bytes, data: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entries(**tensors: Any) -> bytes:
    return json.dumps(tensors).encode()


def entry(begin: int, end: int, shape: list[int], dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("text,data,words", [
    (entries(a=entry(0, 4, [4]), b=entry(2, 6, [4])), 6, "overlap or leave a hole"),
    (entries(a=entry(0, 4, [4]), b=entry(5, 6, [1])), 6, "overlap or leave a hole"),
    (entries(a=entry(4, 0, [4])), 4, "do not fit shape"), (entries(a=entry(0, 400, [400])), 4, "end at byte"),
    (entries(a=entry(0, 4, [4])), 5, "end at byte"), (entries(a=entry(0, 4, [4], "F9")), 4, "unknown dtype 'F9'"),
    (entries(a=entry(0, 4, [-4])), 4, "no lists of counts"), (entries(a=entry(0, 4, [1 << 62] * 2)), 4, "do not fit"),
    (entries(a={"dtype": "U8"}), 4, "its entry is"), (b'{"a":{},"a":{}}', 0, "comes twice"),
    (b"[1]", 0, "no JSON object"),
    (b"[" * 100_000, 0, "no JSON that can be read"), (b"\x80\x04\x95pickle.", 0, "no JSON that can be read"),
    (b"", 0, "no JSON that can be read"),
])
def test_headers_that_no_writer_makes(text: bytes, data: int, words: str, tmp_path: Path) -> None:
    path = forged(tmp_path / "forged.safetensors", text, bytes(data))
    with pytest.raises(Malformed, match=words):
        header.read(path, mapped.map_file(path))


def test_a_header_of_100_mb(tmp_path: Path) -> None:
    """Refused by its first eight bytes, not read."""
    path = forged(tmp_path / "large.safetensors", b"{}", length=100 << 20)
    os.truncate(path, 200 << 20)
    with pytest.raises(Malformed, match="a header of 104,857,600 bytes; at most 33,554,432 are read"):
        header.read(path, mapped.map_file(path))
    forged(path, b"{}", length=9)
    with pytest.raises(Malformed, match="a header of 9 bytes in a file of 10"):
        header.read(path, mapped.map_file(path))


class Bomb:
    """What a pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch exploded",)


def test_a_pickle_in_place_of_a_file(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is executed, wherever it lies."""
    import pickle

    monkeypatch.chdir(two)
    for name in NAMES:
        content = (last(two) / name).read_bytes()
        (last(two) / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(Damaged, match=name):
            proven(last(two))
        assert verify(two)
        (last(two) / name).write_bytes(content)
    assert not (two / "exploded").exists()


def test_a_manifest_of_a_later_format(two: Path) -> None:
    path = last(two) / "manifest.json"
    tree = manifest.decode(path, path.read_bytes())
    del tree["xxh3_128"]
    path.write_bytes(manifest.encode(tree | {"format": 2, "producer": "fasttrain 9.0"}))
    with pytest.raises(NotACheckpoint, match=r"in format 2 by 'fasttrain 9.0'; this is fasttrain .*: install that"):
        Reader(last(two))


def test_a_manifest_of_two_gigabytes(two: Path) -> None:
    """A sparse one: refused by its size."""
    os.truncate(last(two) / "rank-00000-of-00002.json", 2 << 30)
    with pytest.raises(Damaged, match="2,147,483,648 bytes"):
        Reader(last(two))
