"""Forged files whose checksums are right: whatever they say, the answer is a typed error or the checkpoint."""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpointing import save

from fasttrain.checkpoint import header, manifest, mapped
from fasttrain.checkpoint.files import CheckpointError, Keep, Reader, complete, inspect, newest, verify

WRONG = (None, True, -1, 0, 1, 3, 1 << 31, 1 << 63, 1 << 70, 1.5, float("nan"), "", "x", "F32", "../x", "\x00",
         "0" * 32, [], [0], [1] * 9, [1 << 40] * 3, [[0], [1]], {}, {"a": 1})
KEEP = Keep(last=1, best=1, metric="loss", every_s=1, ages_s=(1,))


def places(tree: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every node of a tree."""
    yield way
    for key, inner in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(inner, (*way, key))


def forgeries(tree: Any, draw: random.Random, count: int) -> Iterator[Any]:
    """Copies of a tree with one node wrong, gone, or twice there."""
    ways = [way for way in places(tree) if way]
    for _ in range(count):
        forged = copy.deepcopy(tree)
        *way, last = draw.choice(ways)
        holder = forged
        for key in way:
            holder = holder[key]
        kind = draw.random()
        if kind < 0.1:
            del holder[last]
        elif kind < 0.2 and isinstance(holder, list):
            holder.insert(last, copy.deepcopy(holder[last]))
        else:
            holder[last] = copy.deepcopy(draw.choice(WRONG))
        yield forged


def write(path: Path, tree: dict[str, Any]) -> None:
    path.write_bytes(manifest.encode(tree))


def read(path: Path) -> dict[str, Any]:
    tree = manifest.decode(path, path.read_bytes())
    del tree["xxh3_128"]
    return tree


def all_of_it(root: Path) -> None:
    """Everything that looks at a checkpoint; a refusal is a typed error."""
    KEEP.chosen([found for found in complete(root) if found.reason is None])
    newest(root)
    verify(root)
    inspect(root)
    with Reader(root / "step-000000000001") as reader:
        for name in reader.tensors:
            reader.read(name)
            reader.read(name, span=(0, 0))
        reader.verify_all((name, manifest.Region(stored.shape)) for name, stored in reader.tensors.items())
    inspect(root / "step-000000000001")


@pytest.mark.parametrize("name", ["manifest.json", "rank-00000-of-00002.json"])
def test_a_node_that_is_wrong(name: str, tmp_path: Path) -> None:
    save(tmp_path, 1, 2, rows=4, metrics={"loss": 1.0})
    path, draw, refused = tmp_path / "step-000000000001", random.Random(name), 0
    top, tree = read(path / "manifest.json"), read(path / name)
    for forged in forgeries(tree, draw, 250):
        write(path / name, forged)
        if name != "manifest.json":
            content = (path / name).read_bytes()
            top["ranks"][0] |= {"size": len(content), "xxh3": manifest.digest(content)}
            write(path / "manifest.json", top)
        try:
            all_of_it(tmp_path)
        except CheckpointError:
            refused += 1
    assert refused > 120


def test_a_header_that_is_wrong(tmp_path: Path) -> None:
    path, draw = tmp_path / "forged.safetensors", random.Random(3)
    file = save(tmp_path, 1, rows=4) / "rank-00000-of-00001.safetensors"
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    tree = json.loads(content[8 : 8 + length])
    refused = 0
    for forged in forgeries(tree, draw, 250):
        text = json.dumps(forged).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
        try:
            for entry in header.read(path, mapped.map_file(path)).values():
                assert 0 <= entry.offset <= entry.offset + entry.nbytes <= path.stat().st_size
        except CheckpointError:
            refused += 1
    assert refused > 180


def test_bytes_that_are_wrong(tmp_path: Path) -> None:
    """Runs of bytes gone, doubled or made up, in any file, checksums not made right."""
    (tmp_path / "whole").mkdir()
    save(tmp_path / "whole", 1, 2, rows=4)
    draw = random.Random(4)
    for _ in range(60):
        root = tmp_path / "broken"
        shutil.copytree(tmp_path / "whole", root)
        path = draw.choice(sorted((root / "step-000000000001").iterdir()))
        content = path.read_bytes()
        at, run = draw.randrange(len(content)), draw.randrange(1, 40)
        instead = draw.choice([b"", content[at : at + run] * 2, draw.randbytes(run)])
        path.write_bytes(content[:at] + instead + content[at + run :])
        with pytest.raises(CheckpointError, match=path.name):
            all_of_it(root)
        assert verify(root)
        shutil.rmtree(root)
