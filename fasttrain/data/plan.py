"""What `fasttrain tokenize` is going to write: which documents go to which file, decided before anything is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash

from fasttrain.data.documents import division, share_of_file, share_of_path, walk
from fasttrain.data.encoders import Bytes, File, last_character
from fasttrain.data.errors import DataError, WrongTokenizer

PLAN = ".plan.json"  # while work is under way


@dataclass(frozen=True)
class Document:
    """A file of text, or a part of one."""

    name: str  # its path below the input
    path: Path
    begin: int
    end: int
    named: bool  # by the user, not found in a directory


@dataclass(frozen=True)
class Job:
    """One token file, and what goes into it."""

    file: str
    documents: list[Document]

    @property
    def size(self) -> int:
        return sum(document.end - document.begin for document in self.documents)


@dataclass(frozen=True)
class Plan:
    """All that is to be done. Equal plans make equal files.

    Attributes:
        splits: by name, the token files.
        about: JSON values that tell plans apart: tokenizer, options, and the documents' names, sizes and times.
        empty: files that were left out because they are.
    """

    splits: dict[str, list[Job]]
    about: dict[str, Any]
    empty: int

    @property
    def jobs(self) -> list[Job]:
        return [job for jobs in self.splits.values() for job in jobs]

    def check_same(self, before: dict[str, Any], out: Path) -> None:
        """Refuse to go on with what other tokens were begun with.

        Raises:
            WrongTokenizer: another tokenizer.
            DataError: other input or options.
        """
        if before["tokenizer"] != self.about["tokenizer"]:
            raise WrongTokenizer(f"{out} has tokens of the tokenizer {before['tokenizer']}, not of "
                                 f"{self.about['tokenizer']}: use that one, or write to another directory")
        changed = [f"{key} {before.get(key)} instead of {self.about[key]}" for key in self.about
                   if before.get(key) != self.about[key]]
        if changed:
            raise DataError(f"{out} was made from other input or options ({', '.join(changed)}): give those, or write "
                            f"to another directory")


def make(inputs: Sequence[Path], encoder: Bytes | File, held_out: float, split_by: Literal["path", "content"],
         shard_bytes: int, out: Path) -> Plan:
    """Look at the input, read nothing of it (but to split by content), and decide. What lies below `out` is no input.

    Raises:
        DataError: there is no text, or a file cannot be read.
    """
    if not inputs:
        raise DataError("no input: name files or directories of text")
    if not 0 <= held_out < 1:
        raise DataError(f"held_out={held_out}: a share between 0 and 1, or 0 for no validation text")
    try:
        documents, empty, times = _documents(inputs, out.absolute())
        splits = _split(documents, held_out, split_by)
    except OSError as error:
        raise DataError(f"cannot read the input: {error.filename}: {error.strerror}") from error
    listed = [[document.name, document.begin, document.end] for jobs in splits.values() for document in jobs]
    about = {
        "tokenizer": f"{encoder.name} {encoder.fingerprint.hex()}", "separator": encoder.separator,
        "held_out": held_out, "split_by": split_by, "shard_bytes": shard_bytes, "files": len(documents),
        "input": xxhash.xxh3_64_hexdigest(json.dumps(listed).encode()),
        "times": xxhash.xxh3_64_hexdigest(json.dumps(times).encode()),
    }
    return Plan({name: _jobs(name, found, shard_bytes) for name, found in splits.items()}, about, empty)


def _documents(inputs: Sequence[Path], out: Path) -> tuple[list[Document], int, list[int]]:
    """All that are not empty, in the order of their names; how many are; and when each was last written."""
    found, empty, times = [], 0, []
    for root in inputs:
        inside = root.is_dir()
        if root.absolute() == out:
            raise DataError(f"{root} is both input and output: write to another directory")
        for name, path in (walk(root) if inside else {root.name: root}).items():
            if out in path.absolute().parents:
                continue
            status = path.stat()
            if status.st_size:
                found.append(Document(name, path.absolute(), 0, status.st_size, not inside))
                times.append(status.st_mtime_ns)
            elif not inside:
                raise DataError(f"{path} is empty: leave it out")
            else:
                empty += 1
    if not found:
        raise DataError(f"no text in {', '.join(map(str, inputs))}: there is no file that is not empty")
    order = sorted(range(len(found)), key=lambda number: found[number].name)
    return [found[number] for number in order], empty, [times[number] for number in order]


def _split(documents: list[Document], held_out: float, split_by: str) -> dict[str, list[Document]]:
    if not held_out:
        return {"train": documents}
    if len(documents) == 1:
        whole, = documents
        if whole.end < 2:
            raise DataError(f"{whole.path} has one byte: too little for text to train on and to validate with; use "
                            f"held_out=0")
        cut = _character(whole.path, whole.end - max(1, round(held_out * whole.end)))
        first, last = asdict(whole), asdict(whole)
        return {"train": [Document(**{**first, "end": cut})], "validation": [Document(**{**last, "begin": cut})]}
    shares = {number: share_of_path(document.name) if split_by == "path" else share_of_file(document.path)
              for number, document in enumerate(documents)}
    chosen = division(shares, held_out)
    return {"train": [document for number, document in enumerate(documents) if number not in chosen],
            "validation": [document for number, document in enumerate(documents) if number in chosen]}


def _character(path: Path, place: int) -> int:
    """The nearest place before in a file, or after its first byte, where a character of UTF-8 begins."""
    with open(path, "rb") as file:
        begin = max(0, place - 8)
        file.seek(begin)
        return max(1, begin + last_character(file.read(place - begin + 1)))


def _jobs(split: str, documents: list[Document], shard_bytes: int) -> list[Job]:
    """Cut a list of documents into files as soon as each is large enough."""
    groups: list[list[Document]] = [[]]
    size = 0
    for document in documents:
        if size >= shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(document)
        size += document.end - document.begin
    return [Job(f"{split}-{number:05}.tokens", group) for number, group in enumerate(groups)]
