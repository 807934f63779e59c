"""What is written: read back by us and by safetensors, equal for equal states, and only what is needed is read."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from checkpointing import CHUNK, arrays, pieces, proven, save, values
from helpers import ROOT
from safetensors import safe_open

from benchmarks import bench_checkpoint
from fasttrain.checkpoint import header, mapped
from fasttrain.checkpoint.files import (
    DISK,
    Damaged,
    Files,
    Incomplete,
    Piece,
    Reader,
    complete,
    newest,
    publish,
    write_rank,
)
from fasttrain.checkpoint.pieces import SIZES
from fasttrain.checkpoint.regions import Region


def test_no_torch() -> None:
    code = "import sys, fasttrain.checkpoint.files; print(sorted({'torch', 'tyro', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("world", [1, 2, 3])
def test_round_trip(world: int, tmp_path: Path) -> None:
    path = save(tmp_path, 12, world, metrics={"validation": 1.5})
    assert path == tmp_path / "step-000000000012"
    assert proven(path) == 12
    found = newest(tmp_path)
    assert complete(tmp_path) == [found]
    assert (found.step, found.sequence, found.world, found.reason) == (12, 1, world, None)
    assert found.metrics == {"validation": 1.5}
    assert found.nbytes == sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert {file.name for file in path.iterdir()} == {
        "manifest.json", *(f"rank-{r:05}-of-{world:05}.{end}" for r in range(world) for end in ("json", "safetensors"))}


def test_a_plain_reader_of_safetensors_reads_it(tmp_path: Path) -> None:
    """Whole tensors under their names, parts under name@part; for torch and numpy."""
    path = save(tmp_path, 3, 2)
    whole = arrays(3)
    loaded = {}
    for rank in range(2):
        file = path / f"rank-0000{rank}-of-00002.safetensors"
        with safe_open(file, "pt") as reader:
            assert reader.metadata() == {"format": "pt"}
            loaded |= {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    assert torch.equal(loaded["optimizer/step"], torch.tensor(3))
    assert bytes(loaded["model/bias"].view(torch.uint16).numpy()) == whole["model/bias"].tobytes()
    assert loaded["model/bias"].dtype == torch.bfloat16
    assert loaded["model/none"].shape == (0, 3)
    first, second = loaded["model/weight@0+600"], loaded["model/weight@600+600"]
    assert torch.equal(torch.cat([first, second]).view(40, 30), torch.tensor(whole["model/weight"]))
    left, right = (loaded[f"optimizer/weight/exp_avg@0,{low}+40,15"] for low in (0, 15))
    assert torch.equal(torch.cat([left, right], 1), torch.tensor(whole["optimizer/weight/exp_avg"]))


def test_our_reader_of_headers_reads_theirs(tmp_path: Path) -> None:
    whole = arrays(4) | {"ünï/∂": np.ones((2, 2), np.float16)}
    safetensors.numpy.save_file(whole, tmp_path / "theirs.safetensors", {"any": "thing"})
    view = mapped.map_file(tmp_path / "theirs.safetensors")
    entries = header.read(tmp_path / "theirs.safetensors", view)
    assert {name: bytes(view[entry.offset : entry.offset + entry.nbytes]) for name, entry in entries.items()} == {
        name: array.tobytes() for name, array in whole.items()}
    mapped.unmap(view)


def test_every_dtype(tmp_path: Path) -> None:
    """safetensors accepts each name with that size, and data is aligned to its elements."""
    made = [Piece(dtype, dtype, (3,), memoryview(bytes(3 * size))) for dtype, size in SIZES.items()]
    write_rank(tmp_path / ".part", 0, 1, made, {})
    path = publish(tmp_path, tmp_path / ".part", 1, 1) / "rank-00000-of-00001.safetensors"
    with safe_open(path, "np") as reader:
        assert {name: reader.get_slice(name).get_dtype() for name in reader.keys()} == {d: d for d in SIZES}  # noqa: SIM118
    view = mapped.map_file(path)
    assert all(entry.offset % SIZES[entry.dtype] == 0 for entry in header.read(path, view).values())


def test_large_ranks_have_several_files(tmp_path: Path) -> None:
    """None is larger than asked for, but for a single tensor that is."""
    path = save(tmp_path, 5, file_bytes=5000)
    sizes = [len(file.read_bytes()) for file in sorted(path.glob("*.safetensors"))]
    assert len(sizes) == 3
    assert (path / "rank-00000-of-00001-2.safetensors").exists()
    assert proven(path) == 5


def test_save_load_save(tmp_path: Path) -> None:
    """Every file is equal to the byte but the manifest of all, and that but for its time and place in the order."""
    first = save(tmp_path, 7, 2)
    with Reader(first) as reader:
        for rank in range(2):
            again = [dataclasses.replace(piece, data=reader.read(piece.name, piece.span, piece.box))
                     for piece in reversed(pieces(7, rank, 2))]
            write_rank(tmp_path / ".part-again", rank, 2, again, reader.values(rank), chunk=CHUNK)
    second = publish(tmp_path, tmp_path / ".part-again", 7, 2)
    assert second == tmp_path / "step-000000000007-2"
    for file in sorted(first.iterdir()):
        same = file.read_bytes() == (second / file.name).read_bytes()
        assert same == (file.name != "manifest.json")
    old, new = (json.loads((path / "manifest.json").read_bytes()) for path in (first, second))
    assert {key for key in old if old[key] != new[key]} - {"time"} == {"xxh3_128", "sequence"}


class Counting(Files):
    """What is written, in which calls."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def write(self, file: int, offset: int, buffers) -> None:
        self.sizes.append(sum(map(len, buffers)))
        super().write(file, offset, buffers)


def test_one_pass_in_large_writes(tmp_path: Path) -> None:
    """Each byte is written once, small tensors together, large ones in blocks of a MiB; progress tells them all."""
    many = [Piece(f"small/{n}", "U8", (100,), memoryview(bytes(100))) for n in range(1000)]
    large = Piece("large", "U8", (5 << 20,), memoryview(bytes(5 << 20)))
    files, told = Counting(), []
    write_rank(tmp_path / ".part", 0, 1, [*many, large], {}, files=files, progress=lambda *both: told.append(both))
    data = (tmp_path / ".part" / "rank-00000-of-00001.safetensors").stat().st_size
    manifest = (tmp_path / ".part" / "rank-00000-of-00001.json").stat().st_size
    assert sum(files.sizes) == data + manifest
    assert len(files.sizes) < 12
    assert max(files.sizes) <= 2 << 20
    total = (5 << 20) + 100 * 1000
    assert told[-1] == (total, total)
    assert all(a <= b for (a, _), (b, _) in pairwise(told))


def test_a_short_write_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may take less than it was given: 2 GiB at most, or what a signal left time for."""
    whole, calls = os.pwritev, []

    def short(file: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(len(buffers))
        return os.pwrite(file, b"".join(buffers)[:777], offset)

    monkeypatch.setattr(os, "pwritev", short)
    path = save(tmp_path, 8)
    monkeypatch.setattr(os, "pwritev", whole)
    assert len(calls) > 20
    assert proven(path) == 8


def test_only_the_chunks_that_are_read_are_verified(tmp_path: Path) -> None:
    """A damaged chunk is none of the business of who reads others; and a chunk is hashed once."""
    data = np.arange(10_000, dtype=np.int32)
    write_rank(tmp_path / ".part", 0, 1, [Piece("w", "I32", (100, 100), memoryview(data))], {}, chunk=4096)
    path = publish(tmp_path, tmp_path / ".part", 1, 1)
    file = path / "rank-00000-of-00001.safetensors"
    with Reader(path) as reader:
        begin = reader.tensors["w"].parts[0].offset
    content = bytearray(file.read_bytes())
    content[begin + 5 * 4096] ^= 1
    file.write_bytes(content)
    with Reader(path) as reader:
        assert bytes(reader.read("w", span=(0, 5 * 1024))) == data[: 5 * 1024].tobytes()
        assert bytes(reader.read("w", box=((70, 10), (30, 5)))) == data.reshape(100, 100)[70:, 10:15].tobytes()
        for asked in (dict(span=(5 * 1024, 1)), dict(span=(6 * 1024 - 1, 2)), dict(box=((50, 0), (5, 100))), {}):
            with pytest.raises(Damaged, match="tensor 'w': bytes 20,480 to 24,576 of 40,000") as caught:
                reader.read("w", **asked)
            assert (caught.value.file, caught.value.tensor) == (file, "w")
        assert reader._verified["rank-00000-of-00001.safetensors", begin] == {0, 1, 2, 3, 4, 6, 7, 8, 9}
    with Reader(path, verify=False) as reader:
        assert bytes(reader.read("w")) != data.tobytes()


def test_verified_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk that is needed is hashed once, by any thread; reading hashes nothing again."""
    path = save(tmp_path, 5, 2)
    with Reader(path) as reader:
        wanted = [("model/weight", Region((40, 30), span=(0, 300))), ("optimizer/weight/exp_avg", Region((40, 30))),
                  ("model/weight", Region((40, 30), box=((0, 0), (40, 1)))), ("optimizer/step", Region(()))]
        reader.verify_all(wanted)
        files = [f"rank-0000{rank}-of-00002.safetensors" for rank in range(2)]
        seen = {(file, len(chunks)) for (file, _), chunks in reader._verified.items()}
        assert seen == {(files[0], 1), (files[0], 3), (files[0], 5), (files[1], 3), (files[1], 5)}
        monkeypatch.setattr(mapped, "digest", lambda _: pytest.fail("hashed again"))
        assert bytes(reader.read("optimizer/weight/exp_avg")) == arrays(5)["optimizer/weight/exp_avg"].tobytes()
    monkeypatch.undo()
    content = bytearray((path / files[0]).read_bytes())
    content[-1] ^= 1
    (path / files[0]).write_bytes(content)
    with Reader(path) as reader, pytest.raises(Damaged, match="tensor 'rng/rank0/torch'"):
        reader.verify_all([(name, Region(stored.shape)) for name, stored in reader.tensors.items()], threads=3)
    with Reader(path, verify=False) as reader:
        reader.verify_all([(name, Region(stored.shape)) for name, stored in reader.tensors.items()])
        assert reader._verified == {}


def test_only_the_files_that_are_needed_are_opened(tmp_path: Path) -> None:
    path = save(tmp_path, 9, 4)
    with Reader(path) as reader:
        reader.read("model/weight", span=(10, 100))
        assert [*reader._maps] == ["rank-00000-of-00004.safetensors"]


@pytest.mark.parametrize("wrong,words", [
    (dict(name="nothing"), "has no tensor 'nothing'"),
    (dict(name="model/bias", span=(5, 3)), "runs past the 7 elements"),
    (dict(name="model/bias", out=np.zeros(6, np.uint16)), "14 bytes .* it has 12"),
    (dict(name="model/bias", out=np.zeros(14, np.uint16)[::2]), "strided"),
    (dict(name="model/bias", out=memoryview(bytes(14))), "read-only"),
])
def test_reads_that_cannot_be(wrong: dict, words: str, tmp_path: Path) -> None:
    with Reader(save(tmp_path, 1)) as reader, pytest.raises((KeyError, ValueError), match=words):
        reader.read(**wrong)


def test_pieces_that_cannot_be() -> None:
    data = memoryview(np.zeros(4, np.float32))
    for arguments, words in [(("", "F32", (4,), data), "cannot be named ''"),
                             (("w", "F33", (4,), data), "'F33' is none of"),
                             (("w", "F32", (5,), data), "16 bytes of data, but 5 elements of F32 have 20"),
                             (("w", "F32", (2,), data[::2]), "not contiguous"),
                             (("w", "F32", (8,), data, (6, 4)), "runs past the 8 elements")]:
        with pytest.raises(ValueError, match=words):
            Piece(*arguments)


@pytest.mark.parametrize("tree,words", [
    ({"betas": (0.9, 0.99)}, r"values\.betas is a tuple"), ({"a": [{"b": {1, 2}}]}, r"values\.a\[0\]\.b is a set"),
    ({1: 2}, "the key 1"), ({"x": np.float32(1)}, "values.x is a float32"),
    ({"t": torch.zeros(1)}, "values.t is a Tensor"),
])
def test_values_that_json_would_change(tree: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=words):
        write_rank(tmp_path / ".part", 0, 1, [], tree)
    assert not (tmp_path / ".part").exists()


def test_values_come_back(tmp_path: Path) -> None:
    tree = {"ü": "\ud800∂\n", "n": [0.1, -0.0, 1e308, float("inf"), 1 << 200, True, None, []], "d": {"": {}}}
    write_rank(tmp_path / ".part", 0, 1, [], tree)
    with Reader(publish(tmp_path, tmp_path / ".part", 0, 1)) as reader:
        assert reader.values() == tree
        assert str(reader.values()) == str(tree)
        with pytest.raises(ValueError, match="ranks 0 to 0, not 1"):
            reader.values(1)


def test_twice_the_same_piece(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="given twice: model/bias, model/none"):
        write_rank(tmp_path / ".part", 0, 1, [*pieces(1), *pieces(1)[1::4]], values(1, 0))
    assert not (tmp_path / ".part").exists()


def test_ranks_that_are_missing(tmp_path: Path) -> None:
    """Nothing is published, and those that are waited for can be watched."""
    asked: list[list[int]] = []
    for rank in (0, 2):
        write_rank(tmp_path / ".part", rank, 4, pieces(1, rank, 4), values(1, rank))
    with pytest.raises(Incomplete, match=r"within 0.05 s nothing came from ranks 1, 3 of 4; nothing was published"):
        publish(tmp_path, tmp_path / ".part", 1, 4, deadline_s=0.05, waiting=asked.append)
    assert asked[0] == [1, 3]
    assert complete(tmp_path) == []


def test_a_rank_that_comes_late(tmp_path: Path) -> None:
    part = tmp_path / ".part"
    write_rank(part, 0, 2, pieces(1, 0, 2), values(1, 0), chunk=CHUNK)
    late = threading.Thread(target=lambda: write_rank(part, 1, 2, pieces(1, 1, 2), values(1, 1), chunk=CHUNK))
    path = publish(tmp_path, part, 1, 2, waiting=lambda ranks: late.start() if not late.ident else None)
    late.join()
    assert proven(path) == 1


def test_any_buffer(tmp_path: Path) -> None:
    """Whatever its format, and of several dimensions: complex numbers are none that memoryview could cast."""
    data = np.arange(6, dtype=np.complex64).reshape(2, 3)
    write_rank(tmp_path / ".part", 0, 1, [Piece("w", "C64", (2, 3), memoryview(data))], {})
    out = np.zeros_like(data)
    with Reader(publish(tmp_path, tmp_path / ".part", 1, 1)) as reader:
        reader.read("w", out=out)
    assert np.array_equal(out, data)


def test_threads_may_read(tmp_path: Path) -> None:
    path = save(tmp_path, 6, 3)
    with Reader(path) as reader, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(reader.read, [name for name in reader.tensors for _ in range(5)]))
        assert [bytes(one) for one in found[::5]] == [arrays(6)[name].tobytes() for name in reader.tensors]


def test_a_directory_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one before it is found, and the disk's words are told."""
    for step in (1, 2):
        last = save(tmp_path, step)
    whole = os.scandir

    def scan(path: Path):
        if path == last:
            raise OSError(5, "Input/output error")
        return whole(path)

    monkeypatch.setattr(os, "scandir", scan)
    assert complete(tmp_path)[0].reason == f"{last}: cannot be read: Input/output error"
    assert newest(tmp_path).step == 1


def test_the_benchmark(tmp_path: Path) -> None:
    """At a tiny size: every rival writes and reads, and ours comes back exact."""
    rows = bench_checkpoint.run(1 << 16, 4, 2, tmp_path)
    assert [row["work"] for row in rows] == ["write", "read"]
    assert bench_checkpoint.report(rows).count("fasttrain ") == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["hash", "write"])
def test_the_interpreter_lock_is_free_meanwhile(what: str, tmp_path: Path) -> None:
    """A thread is seen in the middle of a hash or a write, though the interpreter never takes the lock from it."""
    data = memoryview(bytearray(1 << 27))
    inside = seen = False
    file = DISK.create(tmp_path / "file")

    def work() -> None:
        nonlocal inside
        for _ in range(3):
            inside = True
            if what == "hash":
                mapped.digest(data)
            else:
                DISK.write(file, 0, [data])
            inside = False

    before = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        while thread.is_alive():
            seen |= inside
            threading.Event().wait(0.0001)
        thread.join()
    finally:
        sys.setswitchinterval(before)
        DISK.close(file)
    assert seen
