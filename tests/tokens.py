"""Token files for tests, and a source that fails. Workers import this: no torch here."""

from __future__ import annotations

import dataclasses
import json
import os
import sys

import numpy as np

from fasttrain.data.dataset import FORMAT, INDEX, Part, checksum
from fasttrain.data.shard import Header
from fasttrain.data.windows import Windows
from fasttrain.data.writing import ShardWriter

TOKENIZER = bytes(range(16))


def write_shard(path, documents, vocabulary=256, tokenizer=TOKENIZER, separator=-1):
    """One token file of these documents, each a sequence of tokens."""
    with ShardWriter(path, vocabulary, tokenizer, separator) as shard:
        for document in documents:
            shard.add(np.asarray(document))
    return path


def write_dataset(folder, shards, **options):
    """A directory with an index, as `fasttrain tokenize` leaves it; each shard a list of documents."""
    folder.mkdir(exist_ok=True)
    parts = []
    for number, documents in enumerate(shards):
        path = write_shard(folder / f"train-{number:05}.tokens", documents, **options)
        parts.append(dataclasses.asdict(Part.of(path, Header.read(path))))
    index = {"format": FORMAT, "splits": {"train": {"shards": parts}}}
    (folder / INDEX).write_text(json.dumps({**index, "xxh3": checksum(index)}))
    return folder


def some_documents(count=40, seed=0, most=300, vocabulary=256):
    """Documents of random tokens and lengths, empty ones among them."""
    numbers = np.random.default_rng(seed)
    return [numbers.integers(0, vocabulary, numbers.integers(0, most)) for _ in range(count)]


class Failing(Windows):
    """Windows one of which cannot be read."""

    def reseeded(self, seed):
        return Failing(self.stream, self.length, seed)

    def fetch(self, indices):
        if 9 in indices:
            raise OSError(5, "Input/output error", "disk")
        return super().fetch(indices)


class Target:
    """What a worker is asked for."""

    def add(self, a, b):
        return a + b

    def count(self, n):
        yield from range(n)
        return "done"

    def fail(self, error):
        raise error

    def fail_strangely(self):
        class Unpicklable(Exception):
            pass

        raise Unpicklable("no way")

    def end(self, code):
        os._exit(code)

    def imported(self):
        return sorted(name for name in ("torch", "rich", "tyro") if name in sys.modules)
